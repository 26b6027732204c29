import CoreGraphics
import Foundation
import ImageIO
import PackagedModel
import PhotosUI
import SwiftUI

/// Repeats the stored answers, then answers a picture or a text. The model runs in an actor of its own.
public struct AnswerView: View {
    @State private var said = "Loading"
    @State private var wantsPicture = false
    @State private var text = ""
    @State private var picked: PhotosPickerItem?
    @State private var worker = Worker()

    public init() {}

    public var body: some View {
        VStack(alignment: .leading, spacing: 16) {
            if wantsPicture {
                PhotosPicker("Choose a picture", selection: $picked, matching: .images)
            } else {
                TextField("A sentence", text: $text)
                    .textFieldStyle(.roundedBorder)
                    .onSubmit { answer(text) }
            }
            ScrollView {
                Text(said).frame(maxWidth: .infinity, alignment: .leading)
            }
        }
        .padding()
        .task { (wantsPicture, said) = await worker.open() }
        .onChange(of: picked) { item in answer(item) }
    }

    private func answer(_ sentence: String) {
        Task { said = await worker.answer(sentence) }
    }

    private func answer(_ item: PhotosPickerItem?) {
        guard let item else { return }
        Task {
            let data = try? await item.loadTransferable(type: Data.self)
            said = await worker.answer(data ?? Data())
        }
    }
}

/// Owns the model; only values cross its border.
private actor Worker {
    private var model: PackagedModel?

    func open() -> (wantsPicture: Bool, said: String) {
        do {
            let opened = try PackagedModel()
            model = opened
            let found = try opened.selfCheck()
            let verdict = found.problems.isEmpty ? "passed" : "FAILED"
            let lines = ["self-check \(verdict), worst relative difference \(found.worst)"] + found.problems
            return (opened.wantsPicture, lines.joined(separator: "\n"))
        } catch {
            return (false, "\(error)")
        }
    }

    func answer(_ text: String) -> String {
        told { try $0.classify(text) }
    }

    func answer(_ picture: Data) -> String {
        guard let source = CGImageSourceCreateWithData(picture as CFData, nil),
              let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
        else { return "not a picture" }
        return told { try $0.classify(image) }
    }

    private func told(_ classify: (PackagedModel) throws -> [(label: String, share: Double)]) -> String {
        guard let model else { return "the model is not loaded" }
        do {
            return try classify(model).prefix(5).map { "\($0.label)  \($0.share)" }.joined(separator: "\n")
        } catch {
            return "\(error)"
        }
    }
}
