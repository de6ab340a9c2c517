// A Cryo client made of cryo-client-node, for the interoperation suite.
import {content, follow, obey, published, roundTrip, say, senders, source, sourceVerbs} from "./peer.mjs";

const {cryo} = await published("cryo-client-node");

let session;
let awaited = true; // whether the application reads streams
let extra; // a second socket with the session's id

const code = c => ({code: c});

async function connect({url, token, query = {}}) {
    const s = await cryo(url, token, query);
    session = s;
    s.on("message-utf8", m => say("text", {...content(m), text: m.slice(0, 100)}));
    s.on("message-binary", m => say("binary", content(m)));
    s.on("tx-start", (tx, name) => awaited ? follow(s.streams.get(tx), {tx, name}) : say("unawaited", {tx, name}));
    s.on("closed", (closeCode, reason) => say("closed", {...code(closeCode), reason}));
    const answer = s.HandlePingPongMessage;
    s.HandlePingPongMessage = function (frame) {
        say("heartbeat", {kind: Buffer.from(frame).subarray(13).toString()});
        return answer.call(this, frame);
    };
    return {session: s.session_id};
}

// again opens a further connection with the id that the session has.
async function again({token}) {
    const url = new URL(session.connectionHelper.url);
    if (token) url.searchParams.set("authorization", `Bearer ${token}`);
    const {default: WebSocket} = await published("ws");
    extra = new WebSocket(url);
    return new Promise((resolve, reject) => {
        extra.on("open", () => resolve());
        extra.on("error", reject);
        extra.on("close", closeCode => say("extra-closed", code(closeCode)));
    });
}

obey({
    connect, again,
    // uncaught sends and forgets the promise.
    uncaught: async c => void session.SendUTF8(c.text),
    ...senders(() => session),
    ...sourceVerbs,
    stream: c => session.Stream(source(c), c.name),
    // unawaited makes the application read no further stream, held tells what is kept of one.
    unawaited: async () => { awaited = false; },
    held: async c => ({bytes: session.streams.get(c.tx).readableLength}),
    flow: c => session.SetIncomingFlowControl(c.behaviour),
    roundtrip: () => roundTrip(session.socket),
    close: async () => session.Close(),
    terminate: async () => session.socket.terminate(),
});
say("ready");
