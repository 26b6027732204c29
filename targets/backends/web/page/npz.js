// Reads an .npz file (a zip of .npy arrays) into { name: { type, dims, data } }; stored and deflated entries.
const TYPES = {
  '<f4': ['float32', Float32Array], '<f8': ['float64', Float64Array], '<i8': ['int64', BigInt64Array],
  '<i4': ['int32', Int32Array], '<i2': ['int16', Int16Array], '|i1': ['int8', Int8Array], '|u1': ['uint8', Uint8Array],
  '<u2': ['uint16', Uint16Array], '|b1': ['bool', Uint8Array],
};

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate-raw'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function parseArray(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const wide = bytes[6] > 1;  // version 2 and 3 have a 4-byte header length
  const size = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const start = wide ? 12 : 10;
  const header = new TextDecoder().decode(bytes.subarray(start, start + size));
  const code = /'descr': '([^']+)'/.exec(header)[1];
  const dims = /'shape': \(([^)]*)\)/.exec(header)[1].split(',').map((word) => word.trim()).filter(Boolean).map(Number);
  if (!(code in TYPES)) return null;  // texts, for instance
  const [type, Kind] = TYPES[code];
  return { type, dims, data: new Kind(bytes.slice(start + size).buffer) };
}

export async function readNpz(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - 22;
  while (view.getUint32(end, true) !== 0x06054b50) end -= 1;  // end of the central directory
  let place = view.getUint32(end + 16, true);
  const found = {};
  for (let left = view.getUint16(end + 10, true); left > 0; left -= 1) {
    const method = view.getUint16(place + 10, true);
    const packed = view.getUint32(place + 20, true);
    const [name, extra, comment] = [28, 30, 32].map((offset) => view.getUint16(place + offset, true));
    const local = view.getUint32(place + 42, true);
    const key = new TextDecoder().decode(new Uint8Array(buffer, place + 46, name));
    const data = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const bytes = new Uint8Array(buffer, data, packed);
    const array = parseArray(method === 0 ? bytes : await inflate(bytes));
    if (array) found[key.replace(/\.npy$/, '')] = array;
    place += 46 + name + extra + comment;
  }
  return found;
}
