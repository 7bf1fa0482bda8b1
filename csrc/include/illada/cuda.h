// Where a CUDA launch goes; part of every Params struct of a CUDA op.
#pragma once

namespace illada {

// Everything is enqueued on `stream` and nothing waits for it. Launches allocate nothing: safe in graph capture after
// one call outside of it (the first call of a kernel on a device loads it).
struct CudaLaunch {
  int device = 0;          // ordinal; every pointer of the call belongs to it
  void* stream = nullptr;  // a cudaStream_t of that device; null is its default stream
  // False: CUDA is asked about each pointer once, except during stream capture; host memory and memory of another
  // device are refused. True: the caller guarantees that all pointers are memory of `device`, and CUDA is not asked.
  bool pointers_checked = false;
};

}  // namespace illada
