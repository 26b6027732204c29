// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "PackagedModel",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [
        .library(name: "PackagedModel", targets: ["PackagedModel"]),
        .library(name: "PackagedModelUI", targets: ["PackagedModelUI"]),
    ],
    targets: [
        .target(name: "PackagedModel", resources: [.copy("Resources")]),
        .target(name: "PackagedModelUI", dependencies: ["PackagedModel"]),
        .executableTarget(name: "infer", dependencies: ["PackagedModel"]),
        .testTarget(name: "PackagedModelTests", dependencies: ["PackagedModel"]),
    ]
)
