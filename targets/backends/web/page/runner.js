// Loads model.onnx with ONNX Runtime Web and serves requests of the measuring process until the page is closed.
// A message is: length of the header (uint32, little endian), header (JSON), the tensors' bytes one after another.
import * as ort from './ort.wasm.min.mjs';

const TYPES = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array, bool: Uint8Array,
};

const printed = [];

export function decode(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const tensors = {};
  let offset = 4 + size;
  for (const { name, type, dims, bytes } of header.tensors ?? []) {
    const data = new TYPES[type](buffer.slice(offset, offset + bytes));  // slice: typed arrays need their alignment
    tensors[name] = new ort.Tensor(type, data, dims);
    offset += bytes;
  }
  return { header, tensors };
}

export function encode(header, tensors = {}) {
  const parts = [];
  header.tensors = Object.entries(tensors).map(([name, tensor]) => {
    const view = tensor.data;
    parts.push(new Uint8Array(view.buffer, view.byteOffset, view.byteLength));
    return { name, type: tensor.type, dims: tensor.dims, bytes: view.byteLength };
  });
  const head = new TextEncoder().encode(JSON.stringify(header));
  const size = new Uint8Array(4);
  new DataView(size.buffer).setUint32(0, head.length, true);
  return new Blob([size, head, ...parts]);
}

export async function open(settings) {
  ort.env.wasm.numThreads = settings.threads;
  ort.env.wasm.wasmPaths = new URL('./', import.meta.url).href;
  const wanted = { executionProviders: ['wasm'], graphOptimizationLevel: settings.level };
  if (settings.profile) {
    wanted.enableProfiling = true;  // its file goes to stdout, which is the console.log of when the runtime starts
    console.log = (...words) => printed.push(...words.join(' ').split('\n'));
  }
  return ort.InferenceSession.create('model.onnx', wanted);
}

// Names and operators of the nodes that ran, each once, from the lines of the runtime's profiler.
function ran(session) {
  const nodes = new Map();
  session.endProfiling();
  for (const line of printed.filter((text) => text.startsWith('{"cat" : "Node"'))) {
    const { name, args } = JSON.parse(line.replace(/,\s*$/, ''));
    if (name.endsWith('_kernel_time')) nodes.set(`${args.node_index} ${name}`, [name.slice(0, -12), args.op_name]);
  }
  return [...nodes.values()];
}

async function answer(session, { header, tensors }) {
  if (header.ran) {
    await session.run(tensors);
    return encode({ ok: true, nodes: ran(session) });
  }
  const times = [];
  let outputs = {};
  for (let run = 0; run < header.count; run++) {
    const before = performance.now();
    outputs = await session.run(tensors);
    times.push(performance.now() - before);
  }
  return encode({ ok: true, times }, header.outputs ? outputs : {});
}

export async function serve(settings) {
  let session = null;
  const post = (body) => fetch('reply', { method: 'POST', body });
  try {
    session = await open(settings);
    const facts = { isolated: self.crossOriginIsolated, threads: ort.env.wasm.numThreads, agent: navigator.userAgent };
    await post(encode({ ok: true, ...facts }));
  } catch (error) {
    await post(encode({ ok: false, error: String(error) }));
    return;
  }
  for (;;) {
    const asked = await fetch('job', { cache: 'no-store' });
    if (asked.status === 204) continue;  // nothing to do yet
    if (!asked.ok) return;
    try {
      await post(await answer(session, decode(await asked.arrayBuffer())));
    } catch (error) {
      await post(encode({ ok: false, error: String(error) }));
    }
  }
}
