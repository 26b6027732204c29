import PackagedModel
import XCTest

final class SelfCheckTests: XCTestCase {
    func testStoredAnswersAreRepeated() throws {
        let found = try PackagedModel().selfCheck()
        XCTAssertEqual(found.problems, [])
    }
}
