// What the two peers share: where the packages are, commands on standard
// input, events on standard output. A command is one line of JSON with a number
// and a verb; it is answered by the event "done" or "failed" with that number,
// when its promise settles. Errors that nobody catches are left to Node, which
// ends the process: whether that happens is what the suite looks at.
import {createHash} from "node:crypto";
import {readFileSync} from "node:fs";
import net from "node:net";
import {join, resolve} from "node:path";
import {createInterface} from "node:readline";
import {Readable} from "node:stream";
import {pathToFileURL} from "node:url";

// Both packages want it; Node has it from 22 on.
Promise.withResolvers ??= function () {
    const parts = {};
    parts.promise = new this((resolve, reject) => Object.assign(parts, {resolve, reject}));
    return parts;
};

// cryo-server has no option for the interface, and would listen on all.
const listenAnywhere = net.Server.prototype.listen;
net.Server.prototype.listen = function (port, ...rest) {
    return listenAnywhere.call(this, typeof port === "number" ? {port, host: "127.0.0.1"} : port, ...rest);
};

const modules = resolve(process.env.CRYO_NODE_MODULES);

// published imports a package of the folder, wherever that is.
export async function published(name) {
    const folder = join(modules, name);
    const about = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
    const main = about.exports?.["."]?.import ?? about.exports?.["."] ?? about.main;
    say("package", {name, version: about.version});
    return import(pathToFileURL(join(folder, main)).href);
}

// say writes an event.
export function say(event, fields = {}) {
    const line = JSON.stringify({event, ...fields}, (_, v) => typeof v === "bigint" ? String(v) : v);
    process.stdout.write(line + "\n");
}

// obey runs commands until standard input ends.
export function obey(verbs) {
    const lines = createInterface({input: process.stdin});
    lines.on("line", async line => {
        const command = JSON.parse(line);
        try {
            const verb = {...verbs, alive}[command.do];
            if (!verb) throw new Error(`no such verb: ${command.do}`);
            say("done", {id: command.id, ...(await verb(command) ?? {})});
        } catch (e) {
            say("failed", {id: command.id, error: e instanceof Error ? e.message : String(e)});
        }
    });
    lines.on("close", () => process.exit(0));
}

// alive answers after what is due already, such as a rejection that nobody
// handles.
async function alive() {
    for (let i = 0; i < 3; i++) await new Promise(setImmediate);
}

// content describes data, for comparison.
export function content(data) {
    const bytes = Buffer.from(data);
    return {bytes: bytes.length, sha256: createHash("sha256").update(bytes).digest("hex")};
}

// text and bytes make the data of a command: the suite makes the same.
export const text = ({text, size = 0, seed = 0}) => text ?? letters(size, seed);
function letters(size, seed) {
    const data = Buffer.alloc(size);
    for (let i = 0; i < size; i++) data[i] = 97 + (i + seed) % 26;
    return data.toString("latin1");
}
export function bytes({size = 0, seed = 0}) {
    const data = Buffer.alloc(size);
    for (let i = 0; i < size; i++) data[i] = (i + seed) % 251;
    return data;
}

// senders are the verbs for messages, on a session that target gives.
export const senders = target => ({
    text: c => target(c).SendUTF8(text(c)),
    binary: c => target(c).SendBinary(bytes(c)),
    // texts are sent without waiting in between.
    texts: c => Promise.all(Array.from({length: c.count}, (_, i) => target(c).SendUTF8(`${c.prefix}${i}`))).then(() => {}),
    binaries: c => Promise.all(Array.from({length: c.count}, () => target(c).SendBinary(bytes(c)))).then(() => {}),
});

// A source is what a stream is made of: chunks that come when the suite says
// so, an end or a failure.
const sources = new Map();

class Source {
    waiting = [];
    wake = () => {};
    push(item) {
        this.waiting.push(item);
        this.wake();
    }
    async *[Symbol.asyncIterator]() {
        for (;;) {
            while (this.waiting.length) {
                const {chunk, error} = this.waiting.shift();
                if (error) throw error;
                if (!chunk) return;
                yield chunk;
            }
            await new Promise(resolve => this.wake = resolve);
        }
    }
}

// source gives a Readable for a command: with all of its chunks, or one that
// the verbs chunk, end and fail feed. In object mode chunks stay apart.
export function source({chunks, source: name}) {
    const made = new Source();
    if (name) sources.set(name, made);
    for (const [i, size] of (chunks ?? []).entries()) made.push({chunk: bytes({size, seed: i})});
    if (!name) made.push({});
    return Readable.from(made);
}

export const sourceVerbs = {
    chunk: async c => sources.get(c.source).push({chunk: c.text === undefined ? bytes(c) : Buffer.from(c.text)}),
    end: async c => sources.get(c.source).push({}),
    fail: async c => sources.get(c.source).push({error: new Error("the source has failed")}),
};

// follow reports a stream that is received, from its announcement to its end.
export function follow(stream, about) {
    say("stream", about);
    const hash = createHash("sha256");
    let size = 0, chunks = 0;
    stream.on("data", chunk => {
        size += chunk.length;
        chunks++;
        hash.update(chunk);
        say("chunk", {...about, bytes: chunk.length});
    });
    stream.on("end", () => say("streamed", {...about, bytes: size, chunks, sha256: hash.digest("hex")}));
}

// roundTrip asks the other end for a WebSocket pong: whatever it sent before
// that has arrived then.
export const roundTrip = socket => new Promise((resolve, reject) => {
    socket.once("pong", () => resolve());
    socket.ping(undefined, undefined, e => e && reject(e));
});
