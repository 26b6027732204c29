import CoreGraphics
import Foundation

/// 8-bit pixels, rows of (height, width, channels); 1 or 3 channels.
public struct Picture {
    public let height: Int
    public let width: Int
    public let channels: Int
    public let pixels: [UInt8]

    public init(height: Int, width: Int, channels: Int, pixels: [UInt8]) {
        self.height = height
        self.width = width
        self.channels = channels
        self.pixels = pixels
    }

    /// The pixels of an image, in sRGB.
    public init(_ image: CGImage) throws {
        let count = image.width * image.height
        var buffer = [UInt8](repeating: 0, count: count * 4)
        let space = CGColorSpace(name: CGColorSpace.sRGB)!
        let drawn = buffer.withUnsafeMutableBytes { memory -> Bool in
            guard let context = CGContext(
                data: memory.baseAddress, width: image.width, height: image.height, bitsPerComponent: 8,
                bytesPerRow: image.width * 4, space: space, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue
            ) else { return false }
            context.draw(image, in: CGRect(x: 0, y: 0, width: image.width, height: image.height))
            return true
        }
        guard drawn else { throw Refusal("the image cannot be drawn") }
        let pixels = (0..<(count * 3)).map { buffer[$0 / 3 * 4 + $0 % 3] }
        self.init(height: image.height, width: image.width, channels: 3, pixels: pixels)
    }

    /// A stored (height, width) or (height, width, channels) array of uint8.
    init(stored array: NumberArray) {
        let channels = array.shape.count == 3 ? array.shape[2] : 1
        self.init(height: array.shape[0], width: array.shape[1], channels: channels, pixels: [UInt8](array.bytes))
    }
}

private let bits = 32 - 8 - 2 // fractional bits of a filter's weights

/// The model's input from a picture: channels, size, `(pixel * scale - mean) / std`, layout; with a batch axis.
func pictureInput(_ given: Picture, _ settings: Settings) throws -> NumberArray {
    let size = try settings.fields("size").map(whole)
    var picture = toChannels(given, try settings.number("channels"))
    if size.count == 2 {
        picture = resize(picture, height: size[0], width: size[1], resample: try settings.text("resample"))
    }
    let type = try settings.ports("input")[0].type
    let mean = try settings.fields("mean").map(single)
    let deviation = try settings.fields("std").map(single)
    let scale = try single(settings.text("scale"))
    let planes = try settings.text("layout") == "NCHW"
    let area = picture.height * picture.width
    let channels = picture.channels
    var values = [Double](repeating: 0, count: area * channels)
    for place in 0..<area {
        for channel in 0..<channels {
            let pixel = Float(picture.pixels[place * channels + channel])
            var value = (pixel * scale - mean[channel % mean.count]) / deviation[channel % deviation.count]
            if !type.hasPrefix("float") {
                value = min(max(value.rounded(.toNearestOrEven), 0), 255)
            }
            values[planes ? channel * area + place : place * channels + channel] = Double(value)
        }
    }
    let shape = planes
        ? [1, channels, picture.height, picture.width]
        : [1, picture.height, picture.width, channels]
    return try NumberArray(type: type, shape: shape, values: values)
}

private func single(_ text: String) throws -> Float {
    guard let number = Float(text) else { throw Refusal("`\(text)` is not a number") }
    return number
}

/// Grey is repeated, colour becomes ITU-R 601 luma in fixed point.
private func toChannels(_ from: Picture, _ channels: Int) -> Picture {
    if from.channels == channels || (channels != 1 && channels != 3) {
        return from
    }
    let area = from.height * from.width
    let pixels: [UInt8]
    if channels == 3 {
        pixels = (0..<(area * 3)).map { from.pixels[$0 / 3] }
    } else {
        pixels = (0..<area).map { place in
            let red = 19595 * Int(from.pixels[place * 3])
            let green = 38470 * Int(from.pixels[place * 3 + 1])
            let blue = 7471 * Int(from.pixels[place * 3 + 2])
            return UInt8((red + green + blue + 0x8000) >> 16)
        }
    }
    return Picture(height: from.height, width: from.width, channels: channels, pixels: pixels)
}

private func resize(_ from: Picture, height: Int, width: Int, resample: String) -> Picture {
    if resample == "nearest" {
        return pick(from, rows: nearest(from.height, height), columns: nearest(from.width, width))
    }
    let cubic = resample == "bicubic"
    let wide = from.width == width ? from : convolve(from, size: width, cubic: cubic, columns: true)
    return wide.height == height ? wide : convolve(wide, size: height, cubic: cubic, columns: false)
}

private func pick(_ from: Picture, rows: [Int], columns: [Int]) -> Picture {
    var pixels: [UInt8] = []
    for row in rows {
        for column in columns {
            let start = (row * from.width + column) * from.channels
            pixels.append(contentsOf: from.pixels[start..<(start + from.channels)])
        }
    }
    return Picture(height: rows.count, width: columns.count, channels: from.channels, pixels: pixels)
}

/// Source index of every pixel; the sum runs up as Pillow's does.
private func nearest(_ old: Int, _ new: Int) -> [Int] {
    let scale = Double(old) / Double(new)
    var at = scale * 0.5
    return (0..<new).map { _ in
        let place = min(Int(at), old - 1)
        at += scale
        return place
    }
}

/// Keys (1981), a = -0.5, for bicubic; a triangle for bilinear.
private func kernel(_ place: Double, cubic: Bool) -> Double {
    let x = abs(place)
    if !cubic {
        return max(0.0, 1.0 - x)
    }
    if x < 1 {
        return ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1
    }
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0
}

private struct Window {
    let first: Int
    let weights: [Int]
}

/// Weights of a filter that widens when the picture shrinks.
private func windows(_ old: Int, _ new: Int, cubic: Bool) -> [Window] {
    let scale = Double(old) / Double(new)
    let stretch = max(scale, 1.0)
    let support = (cubic ? 2.0 : 1.0) * stretch
    return (0..<new).map { at in
        let centre = (Double(at) + 0.5) * scale
        let first = max(Int(centre - support + 0.5), 0)
        let last = min(Int(centre + support + 0.5), old)
        let weights = (first..<last).map { kernel((Double($0) - centre + 0.5) * (1.0 / stretch), cubic: cubic) }
        let sum = weights.reduce(0, +)
        return Window(first: first, weights: weights.map { fixed($0 / sum) })
    }
}

private func fixed(_ weight: Double) -> Int {
    Int((weight * Double(1 << bits) + (weight < 0 ? -0.5 : 0.5)).rounded(.towardZero))
}

/// Resample the rows, or the columns, to `size` places.
private func convolve(_ from: Picture, size: Int, cubic: Bool, columns: Bool) -> Picture {
    let windows = windows(columns ? from.width : from.height, size, cubic: cubic)
    let height = columns ? from.height : size
    let width = columns ? size : from.width
    let row = from.width * from.channels
    let step = columns ? from.channels : row
    var pixels: [UInt8] = []
    pixels.reserveCapacity(height * width * from.channels)
    for y in 0..<height {
        for x in 0..<width {
            let window = windows[columns ? x : y]
            let start = window.first * step + (columns ? y * row : x * from.channels)
            for channel in 0..<from.channels {
                var total = 1 << (bits - 1)
                for (index, weight) in window.weights.enumerated() {
                    total += weight * Int(from.pixels[start + index * step + channel])
                }
                pixels.append(UInt8(min(max(total >> bits, 0), 255)))
            }
        }
    }
    return Picture(height: height, width: width, channels: from.channels, pixels: pixels)
}
