#include "build_info.h"
#include "cpu/row_kernels.h"
#include "illada/illada.h"

namespace illada {

BuildInfo build_info() {
  BuildInfo info;
  info.version = ILLADA_VERSION;
  info.compiler = ILLADA_COMPILER;
#if defined(_OPENMP)
  info.openmp = true;
#endif
  info.cpu_isa = cpu::row_kernels().isa;
  info.cuda_version = ILLADA_CUDA_VERSION;
  info.cuda_archs = ILLADA_CUDA_ARCHS;
  info.cutlass_version = ILLADA_CUTLASS_VERSION;
  info.no_cuda = ILLADA_NO_CUDA;
  return info;
}

}  // namespace illada
