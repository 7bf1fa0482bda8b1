# Is there a CUDA toolkit, and may it be used? Sets ILLADA_WITH_CUDA, ILLADA_CUDA_VERSION and ILLADA_CUDA_ARCH_LIST.
# ILLADA_CUDA=auto uses an nvcc where there is one, off ignores it, on fails without it.

set(ILLADA_WITH_CUDA OFF)
set(ILLADA_CUDA_VERSION "")
set(ILLADA_CUDA_ARCH_LIST "")

string(TOLOWER "${ILLADA_CUDA}" illada_cuda)
if(NOT illada_cuda MATCHES "^(on|off|auto)$")
  message(FATAL_ERROR "illada: ILLADA_CUDA is \"${ILLADA_CUDA}\"; allowed are on, off and auto")
endif()
if(NOT illada_cuda STREQUAL "off")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    message(STATUS "illada: found ${CMAKE_CUDA_COMPILER}; this version has no CUDA kernels yet, building for the CPU")
  elseif(illada_cuda STREQUAL "on")
    message(FATAL_ERROR "illada: ILLADA_CUDA=on, but no nvcc was found (looked at CUDACXX, CUDA_PATH and PATH).\n"
      "Set CUDACXX=/path/to/nvcc, or ILLADA_CUDA=off for a CPU build.")
  else()
    message(STATUS "illada: no nvcc found, building for the CPU")
  endif()
endif()
