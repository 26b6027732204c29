// The packaged model in ONNX Runtime, and what its outputs mean.
#pragma once

#include <memory>
#include <utility>

#include "package.h"

namespace sample {

class Model {
 public:
  // threads: 0 takes those under which the figures of the package were taken.
  Model(const std::string& folder, const Settings& settings, int threads);
  ~Model();
  Arrays Run(const Arrays& inputs);

 private:
  struct Loaded;  // what ONNX Runtime holds; its header is read by model.cc alone
  std::unique_ptr<Loaded> loaded_;
};

// Shares by class, the largest first; empty where the output is not one of classes.
std::vector<std::pair<std::string, double>> Scores(const Array& output, const Settings& settings);

}  // namespace sample
