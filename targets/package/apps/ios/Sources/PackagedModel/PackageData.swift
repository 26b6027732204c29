import Foundation

/// Something the user can mend.
public struct Refusal: Error, CustomStringConvertible {
    public let description: String

    init(_ description: String) {
        self.description = description
    }
}

/// Name, NumPy's name of the type, and shape (-1: any size) of an input or output.
struct Port {
    let name: String
    let type: String
    let shape: [Int]
}

/// An array as it lies in memory, little endian. `type` is NumPy's name of it, or "text".
struct NumberArray {
    let type: String
    let shape: [Int]
    let bytes: Data

    init(type: String, shape: [Int], bytes: Data) {
        self.type = type
        self.shape = shape
        self.bytes = bytes
    }

    init(type: String, shape: [Int], values: [Double]) throws {
        var made = Data()
        for value in values {
            switch type {
            case "float32": append(Float(value).bitPattern, to: &made)
            case "float64": append(value.bitPattern, to: &made)
            case "int64": append(Int64(value), to: &made)
            case "int32": append(Int32(value), to: &made)
            case "int8": append(Int8(value), to: &made)
            case "uint8", "bool": append(UInt8(value), to: &made)
            default: throw Refusal("arrays of type \(type) are not made here")
            }
        }
        self.init(type: type, shape: shape, bytes: made)
    }

    func values() throws -> [Double] {
        switch type {
        case "float32": return numbers(UInt32.self).map { Double(Float(bitPattern: $0)) }
        case "float64": return numbers(UInt64.self).map { Double(bitPattern: $0) }
        case "float16": return numbers(UInt16.self).map(half)
        case "int64": return numbers(Int64.self).map(Double.init)
        case "int32": return numbers(Int32.self).map(Double.init)
        case "int8": return numbers(Int8.self).map(Double.init)
        case "uint8", "bool": return numbers(UInt8.self).map(Double.init)
        default: throw Refusal("arrays of type \(type) are not handled here")
        }
    }

    private func numbers<Number: FixedWidthInteger>(_: Number.Type) -> [Number] {
        let width = MemoryLayout<Number>.size
        return bytes.withUnsafeBytes { buffer in
            (0..<(bytes.count / width)).map { place in
                Number(littleEndian: buffer.loadUnaligned(fromByteOffset: place * width, as: Number.self))
            }
        }
    }
}

private func append<Number: FixedWidthInteger>(_ number: Number, to data: inout Data) {
    withUnsafeBytes(of: number.littleEndian) { data.append(contentsOf: $0) }
}

/// IEEE 754 half precision.
private func half(_ bits: UInt16) -> Double {
    let exponent = Int(bits >> 10) & 31
    let fraction = Double(bits & 1023)
    var size: Double
    switch exponent {
    case 0: size = fraction * pow(2, -24)
    case 31: size = fraction == 0 ? Double.infinity : Double.nan
    default: size = (1024 + fraction) * pow(2, Double(exponent - 25))
    }
    if bits & 0x8000 != 0 {
        size = -size
    }
    return size
}

/// A stored sample: model inputs and answers by name, and what it was before pre-processing.
struct Sample {
    var input: [String: NumberArray] = [:]
    var output: [String: NumberArray] = [:]
    var raw: [NumberArray] = []
}

/// The lines of `settings.tsv` by key.
struct Settings {
    private var lines: [String: [[String]]] = [:]

    init(folder: URL) throws {
        for line in try readLines(folder.appendingPathComponent("settings.tsv")) {
            lines[line[0], default: []].append(Array(line.dropFirst()))
        }
    }

    func all(_ key: String) -> [[String]] {
        lines[key] ?? []
    }

    func fields(_ key: String) throws -> [String] {
        guard let found = lines[key]?.last else { throw Refusal("settings.tsv has no `\(key)`") }
        return found
    }

    func text(_ key: String) throws -> String {
        guard let found = try fields(key).first else { throw Refusal("settings.tsv has no value of `\(key)`") }
        return found
    }

    func number(_ key: String) throws -> Int {
        try whole(try text(key))
    }

    func ports(_ key: String) throws -> [Port] {
        try all(key).map { Port(name: $0[0], type: $0[1], shape: try integers($0[2])) }
    }

    func labels() -> [String] {
        all("label").map { $0[0] }
    }
}

func whole(_ text: String) throws -> Int {
    guard let number = Int(text) else { throw Refusal("`\(text)` is not a whole number") }
    return number
}

func integers(_ text: String) throws -> [Int] {
    try text.split(separator: ",").map { try whole(String($0)) }
}

/// Tab-separated lines, unescaped. Only line feeds end a line: Swift would see CR LF as one character.
func readLines(_ file: URL) throws -> [[String]] {
    let bytes = try Data(contentsOf: file)
    return bytes.split(separator: 10, omittingEmptySubsequences: false).dropLast().map { line in
        line.split(separator: 9, omittingEmptySubsequences: false).map { unescaped(Array($0)) }
    }
}

private func unescaped(_ field: [UInt8]) -> String {
    var made: [UInt8] = []
    var at = 0
    while at < field.count {
        if field[at] == 92, at + 1 < field.count {
            at += 1
            switch field[at] {
            case UInt8(ascii: "t"): made.append(9)
            case UInt8(ascii: "n"): made.append(10)
            case UInt8(ascii: "r"): made.append(13)
            default: made.append(field[at])
            }
        } else {
            made.append(field[at])
        }
        at += 1
    }
    return String(decoding: made, as: UTF8.self)
}

func readSamples(folder: URL) throws -> [Sample] {
    let bytes = try Data(contentsOf: folder.appendingPathComponent("samples.bin"))
    var samples: [Sample] = []
    for line in try readLines(folder.appendingPathComponent("samples.tsv")) {
        let index = try whole(line[0])
        let start = try whole(line[5])
        let end = start + (try whole(line[6]))
        guard start <= end, end <= bytes.count, index <= samples.count else {
            throw Refusal("samples.tsv does not fit samples.bin")
        }
        if index == samples.count {
            samples.append(Sample())
        }
        let array = NumberArray(type: line[3], shape: try integers(line[4]), bytes: bytes.subdata(in: start..<end))
        switch line[1] {
        case "raw": samples[index].raw.append(array)
        case "input": samples[index].input[line[2]] = array
        default: samples[index].output[line[2]] = array
        }
    }
    return samples
}
