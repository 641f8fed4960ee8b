// Detects objects in a picture with a package that `retinanet export --format aoti` wrote:
//     detect ./_C.so model.pt2 picture.ppm [_cuda13.so]
// The picture has been resized as the metadata of the package say. With _cuda13.so, the package
// must be one for CUDA.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>

static void load(const char* library) {
  if (!dlopen(library, RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
}

static at::Tensor read_ppm(const char* path) {  // [H, W, 3] uint8
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0, white = 0;
  file >> kind >> width >> height >> white;
  file.get();
  if (!file || kind != "P6" || white != 255)
    throw std::runtime_error(std::string(path) + ": expected a binary PPM");
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  file.read(reinterpret_cast<char*>(pixels.data_ptr()), pixels.numel());
  if (!file) throw std::runtime_error(std::string(path) + ": expected more pixels");
  return pixels;
}

using Metadata = std::unordered_map<std::string, std::string>;

static int64_t number_after(const std::string& text, const std::string& key) {
  return std::stoll(text.substr(text.find(key) + key.size()));
}

static std::string shown(int64_t height, int64_t width) {
  return std::to_string(height) + " x " + std::to_string(width);
}

static void check_package(const Metadata& metadata) {
  const std::string& postprocess = metadata.at("postprocess");
  if (postprocess != "nms")
    throw std::runtime_error("package: expected --postprocess nms, got " + postprocess);
  const std::string& batch = metadata.at("batch");  // "N" or "\"dynamic\""
  if (batch != "1" && batch != "\"dynamic\"")
    throw std::runtime_error("package: expected --batch 1 or dynamic, got " + batch);
}

// Returns an image [1, 3, H, W] in 0..1, padded at the right and lower side to a size that the
// package takes.
static at::Tensor as_input(const at::Tensor& pixels, const Metadata& metadata) {
  const std::string& size = metadata.at("size");  // "[H, W]" or "\"dynamic\""
  const std::string& rule = metadata.at("preprocessing");
  const int64_t height = pixels.size(0), width = pixels.size(1);
  int64_t padded[2];
  if (size[0] == '[') {
    padded[0] = number_after(size, "[");
    padded[1] = number_after(size, ", ");
    if (height > padded[0] || width > padded[1])
      throw std::runtime_error("picture: expected at most " + shown(padded[0], padded[1]) +
                               " pixels, got " + shown(height, width) + "; resize it");
  } else {
    const int64_t step = number_after(rule, "\"multiple\": "),
                  least = number_after(rule, "\"least\": ");
    for (int i = 0; i < 2; ++i)
      padded[i] = std::max(least, (pixels.size(i) + step - 1) / step * step);
  }
  const std::string stretch = "\"rule\": \"stretch\", \"size\": [";
  if (const size_t begin = rule.find(stretch); begin != std::string::npos) {
    const std::string expected = rule.substr(begin + stretch.size());  // "H, W], ..."
    const int64_t rows = std::stoll(expected), columns = number_after(expected, ", ");
    if (height != rows || width != columns)
      throw std::runtime_error("picture: expected " + shown(rows, columns) + " pixels, got " +
                               shown(height, width) + "; resize it");
  }
  const at::Tensor image = pixels.permute({2, 0, 1}).unsqueeze(0).to(at::kFloat).div(255);
  return at::constant_pad_nd(image, {0, padded[1] - width, 0, padded[0] - height});
}

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: detect _C.so model.pt2 picture.ppm [_cuda13.so]");
  load(argv[1]);
  if (argc > 4) load(argv[4]);
  torch::inductor::AOTIModelPackageLoader package(argv[2]);
  const Metadata metadata = package.get_metadata();
  check_package(metadata);
  const at::Tensor pixels = read_ppm(argv[3]);
  const at::Device device = argc > 4 ? at::kCUDA : at::kCPU;
  const at::Tensor image = as_input(pixels, metadata).to(device);
  const at::Tensor sizes =
      at::tensor({pixels.size(0), pixels.size(1)}, at::kLong).view({1, 2}).to(device);

  std::vector<at::Tensor> found = package.run({image, sizes});  // boxes, scores, labels, count
  for (at::Tensor& output : found) output = output.cpu();
  const auto boxes = found[0].accessor<float, 3>();
  for (int64_t i = 0; i < found[3].item<int64_t>(); ++i) {
    std::cout << "class " << found[2][0][i].item<int64_t>() << "  score "
              << found[1][0][i].item<float>() << "  box";
    for (int side = 0; side < 4; ++side) std::cout << ' ' << boxes[0][i][side];
    std::cout << '\n';
  }
} catch (const std::exception& error) {
  std::cerr << "detect: error: " << error.what() << '\n';
  return 1;
}
