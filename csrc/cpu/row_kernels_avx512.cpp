#define ILLADA_ISA avx512
#define ILLADA_ISA_NAME "avx512"
#include "cpu/row_kernels_impl.h"

namespace illada::cpu {
extern const RowKernels kRowKernelsAvx512 = avx512::kTable;
}
