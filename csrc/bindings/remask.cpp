// Bindings of remasking: csrc/include/illada/remask.h.
#include "illada/remask.h"

#include "bindings/fields.h"
#include "bindings/module.h"

namespace illada::bindings {
namespace {

constexpr Field<remask::RemaskParams> kRemaskFields[] = {
    FIELD(tokens),      FIELD(tokens_are_int64), FIELD(num_tokens),    FIELD(rows),
    FIELD(cu_rows),     FIELD(num_rows),         FIELD(num_sequences), FIELD(token),
    FIELD(confidence),  FIELD(entropy),          FIELD(rule),          FIELD(limit),
    FIELD(limits),      FIELD(mask_id),          FIELD(min_commit),    FIELD(end_ids),
    FIELD(num_end_ids), FIELD(committed),        FIELD(remaining),     FIELD(finished),
    FIELD(ended),       FIELD(launch),
};

}  // namespace

void define_remask(py::module_& m) {
  Function<kRemaskFields, run<remask::remask_cpu, remask::remask_cuda, remask::RemaskParams>>::define(m, "remask");
}

}  // namespace illada::bindings
