// node client.js HOST:PORT USER
// The protos are read as they are. Their rules (buf/validate) are options that a client need not know: the import is
// answered by an empty file, so that nothing has to be downloaded.
const fs = require("fs");
const os = require("os");
const path = require("path");
const { randomUUID } = require("crypto");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const protos = path.join(__dirname, "..", "..", "protos");
const shim = fs.mkdtempSync(path.join(os.tmpdir(), "creditmesh-"));
fs.mkdirSync(path.join(shim, "buf", "validate"), { recursive: true });
fs.writeFileSync(path.join(shim, "buf", "validate", "validate.proto"), 'syntax = "proto3"; package buf.validate;');
const definition = loader.loadSync("creditmesh/llm/v1/llm_service.proto", {
  includeDirs: [protos, shim], keepCase: true, longs: String, enums: String, oneofs: true,
});
const { LLMService } = grpc.loadPackageDefinition(definition).creditmesh.llm.v1;

const [address, user] = process.argv.slice(2);
const client = new LLMService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
if (process.env.CREDITMESH_TOKEN) metadata.set("authorization", `Bearer ${process.env.CREDITMESH_TOKEN}`);
const messages = [{ role: "ROLE_USER", content: [{ text: "Hello, what are you?" }] }];

function stream() {
  return new Promise((resolve, reject) => {
    let callId = "";
    const events = client.Stream({ billing: { user_id: user, request_id: randomUUID() }, messages, max_output_tokens: 200 }, metadata);
    events.on("data", (event) => {
      if (event.event === "started") callId = event.started.call_id;
      if (event.event === "delta") process.stdout.write(event.delta.text);
      if (event.event === "finished") console.log(`\ncharged ${event.finished.charge.credit_micros} micro-credits`);
    });
    events.on("error", reject);
    events.on("end", () => resolve(callId));
  });
}

const unary = (method, request) =>
  new Promise((resolve, reject) => client[method](request, metadata, (error, answer) => (error ? reject(error) : resolve(answer))));

(async () => {
  const callId = await stream();
  const schema = JSON.stringify({ type: "object", properties: { city: { type: "string" } }, required: ["city"] });
  const answer = await unary("Generate", {
    billing: { user_id: user }, messages, response_format: { json_schema: { name: "city", schema, strict: true } },
  });
  console.log("json:", JSON.parse(answer.outputs[0].message.content[0].text));
  const { call } = await unary("GetCall", { call_id: callId });
  console.log("state:", call.state, "attempts:", call.attempts.length);
  try {
    await unary("Generate", { billing: { user_id: user }, model: "no-such-model", messages });
  } catch (error) {
    console.log("refused:", grpc.status[error.code], error.details);
  }
  client.close();
})().catch((error) => { console.error(error); process.exit(1); });
