import Foundation

/// Token and type ids.
struct Tokens {
    var ids: [Int]
    var types: [Int]
}

private typealias Code = UInt32

private enum Kind: String {
    case plain, drop, space, punctuation, wide
}

private struct Special {
    let id: Int
    let text: [Code]
    let left: Bool
    let right: Bool
}

/// Runs of code points, each with its kind.
private struct Runs {
    private let sorted: [(first: Code, last: Code, kind: Kind)]

    init(_ lines: [[String]]) throws {
        sorted = try lines.map { (try hex($0[1]), try hex($0[2]), Kind(rawValue: $0[0]) ?? .plain) }
            .sorted { $0.0 < $1.0 }
    }

    func kind(_ code: Code) -> Kind {
        var low = 0
        var high = sorted.count
        while low < high {
            let middle = (low + high) / 2
            if sorted[middle].first <= code {
                low = middle + 1
            } else {
                high = middle
            }
        }
        return low > 0 && code <= sorted[low - 1].last ? sorted[low - 1].kind : .plain
    }
}

private func hex(_ text: String) throws -> Code {
    guard let code = Code(text, radix: 16) else { throw Refusal("`\(text)` is not a code point") }
    return code
}

private func codes(_ text: String) -> [Code] {
    text.unicodeScalars.map { $0.value }
}

/// BERT's WordPiece: Devlin et al. (2019). The same ids as the package's `infer.py`.
///
/// Pieces are looked up as lists of code points: Swift's strings would count "é" and "e" with an accent as equal.
struct Tokenizer {
    private var vocabulary: [[Code]: Int] = [:]
    private var changed: [Code: [Code]] = [:]
    private var hangul = false
    private let cleaning: Runs
    private let splitting: Runs
    private let special: [Special]
    private let prefix: [Code]
    private let before: [Int]
    private let after: [Int]
    private let layout: [[String]]
    private let unknown: Int
    private let longestWord: Int
    private let longest: Int

    init(folder: URL, settings: Settings) throws {
        for line in try readLines(folder.appendingPathComponent("vocabulary.tsv")) {
            vocabulary[codes(line[1])] = try whole(line[0])
        }
        let lines = try readLines(folder.appendingPathComponent("characters.tsv"))
        for line in lines where line[0] == "to" {
            changed[try hex(line[1])] = try line[2].split(separator: " ").map { try hex(String($0)) }
        }
        hangul = lines.contains { $0[0] == "hangul" }
        cleaning = try Runs(lines.filter { $0[0] == "drop" || $0[0] == "wide" })
        splitting = try Runs(lines.filter { $0[0] == "space" || $0[0] == "punctuation" })
        special = try settings.all("special").map {
            Special(id: try whole($0[0]), text: codes($0[1]), left: $0[2] == "1", right: $0[3] == "1")
        }
        prefix = codes(try settings.text("prefix"))
        before = try settings.fields("before").map(whole)
        after = try settings.fields("after").map(whole)
        layout = settings.all("pair_part")
        unknown = try settings.number("unknown")
        longestWord = try settings.number("longest_word")
        longest = try settings.number("max_length")
    }

    /// A text, cut to the model's length.
    func encode(_ text: String) -> Tokens {
        let room = max(0, longest - before.count - after.count)
        let ids = before + allIds(codes(text), enough: room).prefix(room) + after
        return Tokens(ids: ids, types: ids.map { _ in 0 })
    }

    /// Two texts; the longer one is cut first.
    func encode(_ first: String, _ second: String) throws -> Tokens {
        let signs = layout.filter { $0[1] != "first" && $0[1] != "second" }.reduce(0) { $0 + $1.count - 1 }
        let sides = [first, second].map { allIds(codes($0), enough: Int.max) }
        let lengths = cutLongest(sides[0].count, sides[1].count, room: max(0, longest - signs))
        var made = Tokens(ids: [], types: [])
        for part in layout {
            let found: [Int]
            switch part[1] {
            case "first": found = Array(sides[0].prefix(lengths.0))
            case "second": found = Array(sides[1].prefix(lengths.1))
            default: found = try part.dropFirst().map(whole)
            }
            let type = try whole(part[0])
            made.ids += found
            made.types += found.map { _ in type }
        }
        return made
    }

    private func cutLongest(_ first: Int, _ second: Int, room: Int) -> (Int, Int) {
        var low = min(first, second)
        var high = max(first, second)
        if low + high > room {
            high = low > room ? low : max(low, room - low)
        }
        if low + high > room {
            low = room / 2
            high = room / 2 + room % 2
        }
        return first <= second ? (low, high) : (high, low)
    }

    private func allIds(_ text: [Code], enough: Int) -> [Int] {
        var ids: [Int] = []
        var start = 0
        var at = 0
        while at < text.count, ids.count < enough {
            guard let found = special.first(where: { text[at...].starts(with: $0.text) }) else {
                at += 1
                continue
            }
            var before = at
            while found.left, before > start, splitting.kind(text[before - 1]) == .space {
                before -= 1
            }
            addWords(text[start..<before], to: &ids)
            if ids.count < enough {
                ids.append(found.id)
            }
            at += found.text.count
            while found.right, at < text.count, splitting.kind(text[at]) == .space {
                at += 1
            }
            start = at
        }
        if ids.count < enough {
            addWords(text[start...], to: &ids)
        }
        return ids
    }

    private func normalized(_ text: ArraySlice<Code>) -> [Code] {
        var made: [Code] = []
        for code in text {
            let kind = cleaning.kind(code)
            if kind == .drop {
                continue
            }
            if kind == .wide {
                made.append(32)
            }
            if hangul, code >= 0xAC00, code <= 0xD7A3 {
                made += jamo(code - 0xAC00)
            } else {
                made += changed[code] ?? [code]
            }
            if kind == .wide {
                made.append(32)
            }
        }
        return made
    }

    /// A Hangul syllable falls apart by arithmetic: Unicode Standard, section 3.12.
    private func jamo(_ index: Code) -> [Code] {
        let made = [0x1100 + index / 588, 0x1161 + index % 588 / 28]
        return index % 28 == 0 ? made : made + [0x11A7 + index % 28]
    }

    private func addWords(_ text: ArraySlice<Code>, to ids: inout [Int]) {
        var word: [Code] = []
        for code in normalized(text) {
            let kind = splitting.kind(code)
            if kind == .plain {
                word.append(code)
                continue
            }
            if !word.isEmpty {
                ids += pieces(word)
            }
            word = []
            if kind == .punctuation {
                ids += pieces([code])
            }
        }
        if !word.isEmpty {
            ids += pieces(word)
        }
    }

    private func pieces(_ word: [Code]) -> [Int] {
        var ids: [Int] = []
        var start = 0
        while start < word.count, word.count <= longestWord {
            let head = start == 0 ? [] : prefix
            let ends = stride(from: word.count, to: start, by: -1)
            guard let end = ends.first(where: { vocabulary[head + word[start..<$0]] != nil }) else { return [unknown] }
            ids.append(vocabulary[head + word[start..<end]]!)
            start = end
        }
        return ids.isEmpty ? [unknown] : ids
    }
}

/// Ids as the model's inputs, shape (1, tokens); padded only where the model's shape is fixed.
func textInput(_ tokens: Tokens, _ settings: Settings) throws -> [String: NumberArray] {
    let names = try settings.fields("names")
    var made: [String: NumberArray] = [:]
    for port in try settings.ports("input") where names.contains(port.name) {
        let mask = port.name.contains("mask")
        let kind = !mask && (port.name.contains("type") || port.name.contains("segment"))
        let fixed = port.shape.count == 2 && port.shape[1] > 0
        let size = fixed ? port.shape[1] : tokens.ids.count
        let pad = mask || kind ? 0 : try settings.number("pad_id")
        let values = (0..<size).map { place -> Double in
            if place >= tokens.ids.count {
                return Double(pad)
            }
            return mask ? 1 : Double(kind ? tokens.types[place] : tokens.ids[place])
        }
        made[port.name] = try NumberArray(type: port.type, shape: [1, size], values: values)
    }
    return made
}
