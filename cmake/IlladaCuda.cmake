# Is there a CUDA toolkit, for which GPUs are kernels built, and with which CUTLASS? Sets ILLADA_WITH_CUDA,
# ILLADA_NO_CUDA, ILLADA_CUDA_VERSION, ILLADA_CUDA_ARCH_LIST, ILLADA_CUTLASS_INCLUDE and ILLADA_CUTLASS_VERSION.
# ILLADA_CUDA=auto uses an nvcc where one works, off ignores it, on fails without it.
# ILLADA_CUDA_ARCHS: a list of N-real (machine code) and N-virtual (PTX for later GPUs); default: what CMake's or torch's
# settings say, the GPUs of this machine, or the list in IlladaArchs.cmake. Kernels that need wgmma and TMA are built for the 90a entries alone.

include(IlladaArchs)
include(IlladaCutlass)
include(IlladaNvcc)

set(ILLADA_WITH_CUDA OFF)
set(ILLADA_NO_CUDA "") # why there are no CUDA kernels
set(ILLADA_CUDA_VERSION "")
set(ILLADA_CUTLASS_VERSION "")
set(ILLADA_CUDA_ARCH_LIST "")

string(TOLOWER "${ILLADA_CUDA}" illada_cuda)
if(NOT illada_cuda MATCHES "^(on|off|auto)$")
  message(FATAL_ERROR "illada: ILLADA_CUDA is \"${ILLADA_CUDA}\"; allowed are on, off and auto")
endif()
if(NOT ILLADA_CUDART MATCHES "^(static|shared)$")
  message(FATAL_ERROR "illada: ILLADA_CUDART is \"${ILLADA_CUDART}\"; allowed are static and shared")
endif()

if(illada_cuda STREQUAL "off")
  set(ILLADA_NO_CUDA "ILLADA_CUDA=off")
else()
  illada_choose_nvcc(illada_nvcc ILLADA_NO_CUDA "${illada_cuda}")
endif()

if(ILLADA_NO_CUDA)
  message(STATUS "illada: building for the CPU: ${ILLADA_NO_CUDA}")
else()
  illada_wanted_archs(illada_wanted illada_wanted_by)
  set(CMAKE_CUDA_ARCHITECTURES OFF) # every target names its own
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
    set(CMAKE_CUDA_COMPILER "${illada_nvcc}" CACHE FILEPATH "The CUDA compiler")
  endif()
  enable_language(CUDA)
  # find_package asks for libcudart.so, even where the static one is linked; NVIDIA's wheels have it by its full name.
  string(REGEX MATCH "^[0-9]+" illada_major "${CMAKE_CUDA_COMPILER_VERSION}")
  foreach(library IN ITEMS CUDA_CUDART CUDA_cudart_LIBRARY)
    find_library(${library} NAMES cudart libcudart.so.${illada_major}
      HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} NO_DEFAULT_PATH)
  endforeach()
  find_package(CUDAToolkit REQUIRED)
  set(ILLADA_WITH_CUDA ON)
  set(ILLADA_CUDA_VERSION "${CUDAToolkit_VERSION}")
  set(illada_detected "")
  if(NOT illada_wanted)
    illada_detect_gpus(illada_detected)
  endif()
  illada_known_archs(illada_known "${CMAKE_CUDA_COMPILER}" "${CUDAToolkit_VERSION}")
  illada_choose_archs(ILLADA_CUDA_ARCH_LIST
    "${illada_wanted}" "${illada_detected}" "${illada_known}" "${CUDAToolkit_VERSION}" ${illada_wanted_by})
  if(NOT ILLADA_PYTHON)
    find_package(Python COMPONENTS Interpreter)
  endif()
  illada_find_cutlass(ILLADA_CUTLASS_INCLUDE "${Python_EXECUTABLE}")
  set(ILLADA_CUTLASS_VERSION "${ILLADA_CUTLASS_INCLUDE_VERSION}")
  message(STATUS "illada: CUDA ${CUDAToolkit_VERSION} for ${ILLADA_CUDA_ARCH_LIST}, cudart ${ILLADA_CUDART}")
endif()

# illada_add_cuda(target sm90|portable sources...): sources compiled for the archs they can run on, into `target`.
function(illada_add_cuda target family)
  set(archs "${ILLADA_CUDA_ARCH_LIST}")
  if(family STREQUAL "sm90")
    list(FILTER archs INCLUDE REGEX "^90a-")
    if(NOT archs)
      return()
    endif()
    target_compile_definitions(${target} PRIVATE ILLADA_BUILT_SM90A)
  endif()
  set(objects ${target}_cuda_${family})
  add_library(${objects} OBJECT ${ARGN})
  set_target_properties(${objects} PROPERTIES CUDA_ARCHITECTURES "${archs}" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
    CUDA_VISIBILITY_PRESET hidden POSITION_INDEPENDENT_CODE ON)
  target_include_directories(${objects} PRIVATE csrc csrc/include)
  target_include_directories(${objects} SYSTEM PRIVATE "${ILLADA_CUTLASS_INCLUDE}")
  # NDEBUG in every build type: the asserts in CuTe's and CUTLASS's device code make ptxas serialize wgmma.
  target_compile_options(${objects} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall;-DNDEBUG;--expt-relaxed-constexpr;${ILLADA_NVCC_FLAGS}>")
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
endfunction()
