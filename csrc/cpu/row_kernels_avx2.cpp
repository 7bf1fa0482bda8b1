#define ILLADA_ISA avx2
#define ILLADA_ISA_NAME "avx2"
#include "cpu/row_kernels_impl.h"

namespace illada::cpu {
extern const RowKernels kRowKernelsAvx2 = avx2::kTable;
}
