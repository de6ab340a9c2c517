// A Cryo server made of cryo-server, for the interoperation suite:
// node server.mjs PORT TOKEN KEEPALIVE_MS [BACKPRESSURE], the last as JSON
import {Readable} from "node:stream";
import {bytes, content, follow, obey, published, roundTrip, say, senders, source, sourceVerbs} from "./peer.mjs";

const [port, token, keepAlive, backpressure] = process.argv.slice(2);
const {cryo} = await published("cryo-server");
const server = cryo({validate: async t => t === token},
    {port: Number(port), keepAliveIntervalMs: Number(keepAlive), backpressure: backpressure && JSON.parse(backpressure)});

const sessions = new Map();
let latest;
let awaited = true; // whether the application reads streams

// of gives the session that a command names, or the one that connected last.
const of = c => c.session ? sessions.get(c.session) : latest;

function watch(s) {
    const session = String(s.sid);
    const tell = (event, fields) => say(event, {session, ...fields});
    s.on("message-utf8", m => tell("text", {...content(m), text: m.slice(0, 100)}));
    s.on("message-binary", m => tell("binary", content(m)));
    s.on("message-error", m => tell("error", {text: m}));
    s.on("closed", () => tell("closed"));
    s.on("connected", () => {
        latest = s;
        sessions.set(session, s);
        s.stream.on("tx-start", (tx, name) => awaited
            ? follow(s.stream.incomingStreams.get(tx), {session, tx, name})
            : tell("unawaited", {tx, name}));
        tell("connected");
    });
    s.webSocket.on("message", frame => {
        const b = Buffer.from(frame);
        if (b[8] === 251) tell("heartbeat", {kind: b.subarray(13).toString()});
    });
}

server.on("session", watch);
server.on("listening", () => say("listening", {port: server.http_server.address().port}));

// cancel says TX_CANCEL, for which the package has no call.
async function cancel(c) {
    const s = of(c), frame = Buffer.alloc(17);
    frame.writeBigUInt64BE(BigInt(s.sid));
    frame.writeUInt8(5, 8);
    frame.writeUInt32BE(s.next_ack(), 9);
    frame.writeUInt32BE(c.tx, 13);
    await s.send(frame);
}

// large gives a source of so many chunks, each of them of the same memory.
function* large({count, size}) {
    const chunk = bytes({size});
    for (let i = 0; i < count; i++) yield chunk;
}

// throttled waits until the package's queue has no room for another chunk, so that
// a stream waits to send it.
async function throttled(c) {
    const queue = of(c).bp_mgr;
    const full = () => queue.queued_bytes + c.size > queue.options.MAX_QUEUED_BYTES || queue.queue.length + 1 > queue.options.MAX_QUEUE_SIZE;
    while (!full()) await new Promise(resolve => setTimeout(resolve, 10));
}

obey({
    ...senders(c => of(c).base),
    ...sourceVerbs,
    error: c => of(c).base.SendError(c.text),
    stream: c => of(c).stream.Stream(source(c), c.name),
    large: c => of(c).stream.Stream(Readable.from(large(c)), c.name),
    throttled,
    // unawaited makes the application read no further stream, held tells what is kept of one.
    unawaited: async () => { awaited = false; },
    held: async c => ({bytes: of(c).stream.incomingStreams.get(c.tx).readableLength}),
    flow: c => of(c).stream.SetIncomingFlowControl(c.behaviour),
    fetch: c => of(c).stream.StreamRequestRange(of(c).stream.incomingStreams.get(c.tx), c.start, c.end),
    cancel,
    roundtrip: c => roundTrip(of(c).webSocket),
    close: c => of(c).Close(c.reason),
    terminate: async c => of(c).tcpSocket.destroy(),
    destroy: async () => server.Destroy(),
    // dial makes the server package the dialling end.
    dial: async c => {
        const s = await server.ConnectPeer(c.url, c.token);
        watch(s);
        return {session: String(s.sid)};
    },
});
say("ready");
