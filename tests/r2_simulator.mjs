// Cloudflare's own simulator of R2 (npm: miniflare) behind as much of the S3 API as coldstart uses, for tests/test_stores_r2.py.
// What an object may be called, which conditions hold, which checksums are right and which ranges exist is R2's; signatures are not
// looked at. Prints the address it serves once it does, and ends with its standard input.

import { createRequire } from "node:module";

const { Miniflare } = createRequire(`${process.argv[2]}/`)("miniflare");

const worker = `
const CODES = {
  10007: [404, "NoSuchKey"], 10012: [400, "MetadataTooLarge"], 10014: [400, "InvalidDigest"], 10020: [400, "InvalidObjectName"],
  10031: [412, "PreconditionFailed"], 10037: [400, "BadDigest"], 10039: [416, "InvalidRange"], 10058: [429, "TooManyRequests"],
};

function refusal(number, text = "") {
  const [status, code] = CODES[number] || [500, "InternalError"];
  return new Response("<Error><Code>" + code + "</Code><Message>" + text + "</Message></Error>", {status});
}

function described(object) {
  return {"ETag": object.httpEtag, "Last-Modified": object.uploaded.toUTCString()};
}

function hex(text) {
  return [...atob(text)].map((character) => character.charCodeAt(0).toString(16).padStart(2, "0")).join("");
}

async function put(bucket, key, request) {
  const md5 = request.headers.get("content-md5");
  const options = {onlyIf: request.headers, ...(md5 ? {md5: hex(md5)} : {})};
  const object = await bucket.put(key, await request.arrayBuffer(), options);
  return object === null ? refusal(10031) : new Response(null, {headers: described(object)});
}

async function get(bucket, key, request) {
  const found = /^bytes=([0-9]+)-([0-9]+)$/.exec(request.headers.get("range") || "");
  if (!found) {
    const object = await bucket.get(key);
    return object === null ? refusal(10007) : new Response(await object.arrayBuffer(), {headers: described(object)});
  }
  const first = Number(found[1]);
  const known = await bucket.head(key);
  if (known !== null && first >= known.size) return refusal(10039);  // at the very end the simulator fails, where R2 says so
  const object = await bucket.get(key, {range: {offset: first, length: Number(found[2]) - first + 1}});
  if (object === null) return refusal(10007);
  const body = await object.arrayBuffer();
  const range = "bytes " + first + "-" + (first + body.byteLength - 1) + "/" + object.size;
  return new Response(body, {status: 206, headers: {...described(object), "Content-Range": range}});
}

async function head(bucket, key) {
  const object = await bucket.head(key);
  if (object === null) return new Response(null, {status: 404});
  return new Response(null, {headers: {...described(object), "Content-Length": String(object.size)}});
}

async function list(bucket, query) {
  const page = await bucket.list({prefix: query.get("prefix") || "", cursor: query.get("continuation-token") || undefined, limit: 50});
  const rows = page.objects.map((object) => "<Contents><Key>" + object.key + "</Key><Size>" + object.size + "</Size><LastModified>"
    + object.uploaded.toISOString() + "</LastModified></Contents>");
  const next = page.truncated ? "<NextContinuationToken>" + page.cursor + "</NextContinuationToken>" : "";
  return new Response("<ListBucketResult><IsTruncated>" + page.truncated + "</IsTruncated>" + next + rows.join("") + "</ListBucketResult>");
}

async function answer(request, bucket) {
  const url = new URL(request.url);
  const key = decodeURIComponent(url.pathname).split("/").slice(2).join("/");
  if (request.method === "GET" && !key) return list(bucket, url.searchParams);
  if (request.method === "GET") return get(bucket, key, request);
  if (request.method === "HEAD") return head(bucket, key);
  if (request.method === "PUT") return put(bucket, key, request);
  await bucket.delete(key);
  return new Response(null, {status: 204});
}

export default {
  async fetch(request, env) {
    try {
      return await answer(request, env.BUCKET);
    } catch (error) {
      const number = /\\((\\d{5})\\)/.exec(error.message);
      return refusal(number ? Number(number[1]) : 0, error.message);
    }
  },
};
`;

const simulator = new Miniflare({
  modules: true, script: worker, r2Buckets: ["BUCKET"], host: "127.0.0.1", port: 0, compatibilityDate: "2025-01-01",
});
console.log(String(await simulator.ready));
process.stdin.resume();
process.stdin.on("end", async () => { await simulator.dispose(); process.exit(0); });
