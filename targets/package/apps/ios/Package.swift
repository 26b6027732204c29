// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "PackagedModel",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [
        .library(name: "PackagedModel", targets: ["PackagedModel"]),
        .library(name: "PackagedModelUI", targets: ["PackagedModelUI"]),
    ],
    dependencies: [
        .package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", exact: "1.24.2"),
    ],
    targets: [
        .target(
            name: "PackagedModel",
            dependencies: [.product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")],
            resources: [.copy("Resources")]
        ),
        .target(name: "PackagedModelUI", dependencies: ["PackagedModel"]),
        .executableTarget(name: "infer", dependencies: ["PackagedModel"]),
        .testTarget(name: "PackagedModelTests", dependencies: ["PackagedModel"]),
    ]
)
