import CoreGraphics
import Foundation
import ImageIO
import PackagedModel

/// Answers the pictures or texts of the command line; `--self-check` repeats the stored answers.
func run(_ words: [String]) throws -> Int32 {
    let model = try PackagedModel()
    if words == ["--self-check"] {
        let found = try model.selfCheck()
        found.problems.forEach { print($0) }
        print("self-check \(found.problems.isEmpty ? "passed" : "FAILED"): worst relative difference \(found.worst)")
        return found.problems.isEmpty ? 0 : 1
    }
    for word in words {
        let scores = model.wantsPicture ? try model.classify(try picture(word)) : try model.classify(word)
        print(word)
        for score in scores.prefix(5) {
            print("  \(score.label) \(score.share)")
        }
    }
    return 0
}

func picture(_ path: String) throws -> CGImage {
    let address = URL(fileURLWithPath: path) as CFURL
    guard let source = CGImageSourceCreateWithURL(address, nil),
          let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
    else { throw CocoaError(.fileReadCorruptFile) }
    return image
}

do {
    exit(try run(Array(CommandLine.arguments.dropFirst())))
} catch {
    FileHandle.standardError.write(Data("error: \(error)\n".utf8))
    exit(2)
}
