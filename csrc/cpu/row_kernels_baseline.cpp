#define ILLADA_ISA baseline
#define ILLADA_ISA_NAME "baseline"
#include "cpu/row_kernels_impl.h"

namespace illada::cpu {
extern const RowKernels kRowKernelsBaseline = baseline::kTable;
}
