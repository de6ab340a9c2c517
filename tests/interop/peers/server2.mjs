// A Cryo server made of cryo-server 2.12, for the interoperation suite:
// node server2.mjs PORT TOKEN KEEPALIVE_MS
//
// A session of that version has its calls itself, and does not report that it
// is connected.
import {content, follow, obey, published, roundTrip, say, senders, source, sourceVerbs} from "./peer.mjs";

const [port, token, keepAlive] = process.argv.slice(2);
const {cryo} = await published("cryo-server");
const server = cryo({validate: async t => t === token}, {port: Number(port), keepAliveIntervalMs: Number(keepAlive)});

let session;

function watch(s) {
    session = s;
    const about = {session: String(s.sid)};
    s.on("message-utf8", m => say("text", {...about, ...content(m), text: m.slice(0, 100)}));
    s.on("message-binary", m => say("binary", {...about, ...content(m)}));
    s.on("closed", () => say("closed", about));
    s.on("tx-start", (tx, name) => follow(s.streams.get(tx), {...about, tx, name}));
    s.Client.on("message", frame => {
        if (frame[8] === 255) setImmediate(() => say("connected", about));
    });
}

server.on("session", watch);
server.on("listening", () => say("listening", {port: server.http_server.address().port}));

obey({
    ...senders(() => session),
    ...sourceVerbs,
    stream: c => session.Stream(source(c), c.name),
    flow: c => session.SetIncomingFlowControl(c.behaviour),
    fetch: c => session.StreamFetchRange(session.streams.get(c.tx), c.start, c.end),
    roundtrip: () => roundTrip(session.Client),
    close: c => session.Close(c.reason),
    terminate: async () => session.Client.terminate(),
});
say("ready");
