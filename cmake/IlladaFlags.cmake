# Warnings, OpenMP, and one copy of the row kernels per instruction set.

include("${CMAKE_CURRENT_LIST_DIR}/IlladaWarn.cmake")

find_package(OpenMP QUIET COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
  illada_warn("this compiler has no OpenMP, the CPU ops will use one thread")
endif()

function(illada_set_flags target)
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  if(OpenMP_CXX_FOUND)
    target_link_libraries(${target} PUBLIC OpenMP::OpenMP_CXX)
  endif()
endfunction()

# row_kernels_<isa>.cpp are the same loops with other -m flags; row_kernels.cpp chooses among them at run time, so one
# binary runs anywhere. Only these files may be compiled with such flags.
function(illada_add_cpu_kernels target)
  # GCC's own AVX-512 headers trip -W[maybe-]uninitialized when inlined; -O3 for the unrolling of the row loops.
  set(common -O3 -ffp-contract=fast $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>)
  set_source_files_properties(csrc/cpu/row_kernels_baseline.cpp PROPERTIES COMPILE_OPTIONS "${common}")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    target_sources(${target} PRIVATE csrc/cpu/row_kernels_avx512.cpp csrc/cpu/row_kernels_avx2.cpp)
    set_source_files_properties(csrc/cpu/row_kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "${common};-mavx2;-mfma")
    set_source_files_properties(csrc/cpu/row_kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
      "${common};-mavx512f;-mavx512dq;-mavx512bw;-mavx512vl;-mavx2;-mfma")
    target_compile_definitions(${target} PRIVATE ILLADA_X86)
  endif()
endfunction()
