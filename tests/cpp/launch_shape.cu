// What the library's only way to launch a kernel does with an empty grid or block: see
// tests/builds/test_launch_shape.py.
#include <cstdio>
#include <stdexcept>

#include "common/device.h"
#include "illada/illada.h"

illada::BuildInfo illada::build_info() { return {}; }  // named by an error message that does not come up here

namespace {

// Not a kernel: the shape is looked at first, and nothing is asked of CUDA for a wrong one.
void nothing(int, illada::DependentLaunch) {}

const char* launch(dim3 grid, dim3 block) {
  static std::string said;
  illada::LaunchShape shape;
  shape.grid = grid;
  shape.block = block;
  try {
    illada::launch_kernel("some_op", illada::Device{}, nullptr, shape, nothing, 0);
    return "launched";
  } catch (const illada::CudaError& error) {
    said = std::string("CudaError: ") + error.what();
  } catch (const illada::Error& error) {
    said = std::string("Error: ") + error.what();
  } catch (const std::logic_error& error) {
    said = std::string("logic_error: ") + error.what();
  }
  return said.c_str();
}

}  // namespace

int main() {
  std::puts(launch(dim3(0), dim3(128)));
  std::puts(launch(dim3(4, 0), dim3(128)));
  std::puts(launch(dim3(4, 1, 0), dim3(128)));
  std::puts(launch(dim3(4), dim3(0)));
  std::puts(launch(dim3(4), dim3(128)));
}
