// The packaged model: load it, run it, repeat its stored answers.
import * as ort from './ort.wasm.min.mjs';
import { readNpz } from './npz.js';

const BASE = new URL('../', import.meta.url);

async function fetched(name) {
  const answer = await fetch(new URL(name, BASE));
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer;
}

// Threads need a page with Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp.
export async function load({ threads = self.crossOriginIsolated ? undefined : 1 } = {}) {
  const manifest = await (await fetched('manifest.json')).json();
  ort.env.wasm.numThreads = threads ?? manifest.runtime.threads;
  ort.env.wasm.wasmPaths = new URL('./', import.meta.url).href;
  const session = await ort.InferenceSession.create(await (await fetched(manifest.model.file)).arrayBuffer());
  return {
    manifest,
    threads: ort.env.wasm.numThreads,
    async run(inputs) {
      const feeds = {};
      for (const [name, { type, dims, data }] of Object.entries(inputs)) feeds[name] = new ort.Tensor(type, data, dims);
      return session.run(feeds);
    },
  };
}

function parts(arrays, index, part) {
  const prefix = `${index}.${part}.`;
  const names = Object.keys(arrays).filter((key) => key.startsWith(prefix));
  return Object.fromEntries(names.map((key) => [key.slice(prefix.length), arrays[key]]));
}

export async function selfCheck(model) {
  const arrays = await readNpz(await (await fetched('samples.npz')).arrayBuffer());
  const samples = model.manifest.self_check.samples;
  let difference = 0;
  for (let index = 0; index < samples; index += 1) {
    const outputs = await model.run(parts(arrays, index, 'input'));
    for (const [name, { data }] of Object.entries(parts(arrays, index, 'output'))) {
      const found = outputs[name].data;
      if (found.length !== data.length) throw new Error(`${name}: ${found.length} numbers instead of ${data.length}`);
      for (let i = 0; i < data.length; i += 1) difference = Math.max(difference, Math.abs(Number(found[i]) - Number(data[i])));
    }
  }
  const times = [];
  for (let run = 0; run < 50 && samples > 0; run += 1) {
    const before = performance.now();
    await model.run(parts(arrays, 0, 'input'));
    times.push(performance.now() - before);
  }
  const medianMs = times.sort((a, b) => a - b)[Math.floor(times.length / 2)] ?? NaN;
  const tolerance = model.manifest.self_check.tolerance;
  const passed = samples > 0 && difference <= tolerance;
  const reason = samples > 0 ? `it differs by ${difference} from the stored answers` : 'the package has no samples';
  return { passed, samples, difference, tolerance, medianMs, reason };
}
