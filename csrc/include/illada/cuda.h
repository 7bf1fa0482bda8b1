// Device and stream of a CUDA launch; part of every Params struct of a CUDA op.
#pragma once

namespace illada {

// Every op enqueues its work on `stream` and does not wait for it. Launches allocate nothing. The first call of a
// kernel on a device loads the kernel; after one such call outside of graph capture, calls are safe inside it.
struct CudaLaunch {
  int device = 0;          // device ordinal; every pointer of the call belongs to this device
  void* stream = nullptr;  // a cudaStream_t of that device; null is its default stream
  // False: the library asks CUDA about each pointer once, except during stream capture. It refuses host memory and
  // memory of another device. True: the caller guarantees that all pointers are memory of `device`; CUDA is not asked.
  bool pointers_checked = false;
};

}  // namespace illada
