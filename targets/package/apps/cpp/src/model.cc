#include "model.h"

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>

namespace sample {
namespace {

const std::pair<const char*, ONNXTensorElementDataType> kTypes[] = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}, {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
    {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}, {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
    {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32}, {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
    {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8}, {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL}};

ONNXTensorElementDataType TypeOf(const std::string& name) {
  for (const auto& [known, type] : kTypes) {
    if (name == known) return type;
  }
  throw Refusal("tensors of type " + name + " are not handled by this program");
}

std::string NameOf(ONNXTensorElementDataType type) {
  for (const auto& [name, known] : kTypes) {
    if (type == known) return name;
  }
  throw Refusal("the model has an output of a type that this program does not handle");
}

Array Copied(const Ort::Value& value) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  Array array{NameOf(info.GetElementType()), info.GetShape(), ""};
  const auto size = static_cast<size_t>(array.Count()) * Width(array.type);
  if (size) array.bytes.assign(static_cast<const char*>(value.GetTensorRawData()), size);
  return array;
}

GraphOptimizationLevel LevelOf(const std::string& name) {
  if (name == "disabled") return ORT_DISABLE_ALL;
  if (name == "basic") return ORT_ENABLE_BASIC;
  return name == "extended" ? ORT_ENABLE_EXTENDED : ORT_ENABLE_ALL;
}

}  // namespace

struct Model::Loaded {
  Ort::Env env{ORT_LOGGING_LEVEL_ERROR, "infer"};
  Ort::Session session{nullptr};
  std::vector<std::string> inputs, outputs;
};

Model::~Model() = default;

Model::Model(const std::string& folder, const Settings& settings, int threads) : loaded_(std::make_unique<Loaded>()) {
  const Line& runtime = settings.Fields("runtime");  // name, threads, graph level, arena
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads > 0 ? threads : std::stoi(runtime.at(1)));
  options.SetInterOpNumThreads(1);
  options.SetGraphOptimizationLevel(LevelOf(runtime.at(2)));
  if (runtime.at(3) == "0") options.DisableCpuMemArena();
  const std::string path = folder + "/" + settings.Text("model");
#ifdef _WIN32
  loaded_->session = Ort::Session(loaded_->env, std::wstring(path.begin(), path.end()).c_str(), options);
#else
  loaded_->session = Ort::Session(loaded_->env, path.c_str(), options);
#endif
  Ort::AllocatorWithDefaultOptions allocator;
  const Ort::Session& session = loaded_->session;
  for (size_t place = 0; place < session.GetInputCount(); ++place) {
    loaded_->inputs.push_back(session.GetInputNameAllocated(place, allocator).get());
  }
  for (size_t place = 0; place < session.GetOutputCount(); ++place) {
    loaded_->outputs.push_back(session.GetOutputNameAllocated(place, allocator).get());
  }
}

Arrays Model::Run(const Arrays& inputs) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<Ort::Value> values;
  std::vector<const char*> names, wanted;
  for (const std::string& name : loaded_->inputs) {
    const auto found = inputs.find(name);
    if (found == inputs.end()) throw Refusal("the model's input `" + name + "` is not given");
    const Array& array = found->second;
    // Run reads its inputs only; the interface takes a pointer that is not const.
    values.push_back(Ort::Value::CreateTensor(memory, const_cast<char*>(array.bytes.data()), array.bytes.size(),
                                              array.shape.data(), array.shape.size(), TypeOf(array.type)));
    names.push_back(name.c_str());
  }
  for (const std::string& name : loaded_->outputs) wanted.push_back(name.c_str());
  const auto found = loaded_->session.Run(Ort::RunOptions{}, names.data(), values.data(), values.size(), wanted.data(), wanted.size());
  Arrays outputs;
  for (size_t place = 0; place < found.size(); ++place) outputs[loaded_->outputs[place]] = Copied(found[place]);
  return outputs;
}

std::vector<std::pair<std::string, double>> Scores(const Array& output, const Settings& settings) {
  const std::string& kind = settings.Text("postprocess");
  const bool logits = kind == "softmax" || kind == "sigmoid";
  if (!logits && kind != "probabilities" && kind != "independent-probabilities") return {};
  std::vector<double> shares = output.Values();
  const double largest = *std::max_element(shares.begin(), shares.end());
  double sum = 0;
  for (double& share : shares) {
    if (logits) share = kind == "softmax" ? std::exp(share - largest) : 1 / (1 + std::exp(-share));
    sum += share;
  }
  const std::vector<std::string> labels = settings.Labels();
  std::vector<std::pair<std::string, double>> scores;
  for (size_t place = 0; place < shares.size(); ++place) {
    scores.emplace_back(place < labels.size() ? labels[place] : std::to_string(place),
                        kind == "softmax" ? shares[place] / sum : shares[place]);
  }
  std::stable_sort(scores.begin(), scores.end(), [](const auto& one, const auto& other) { return one.second > other.second; });
  return scores;
}

}  // namespace sample
