# Where the headers of CUTLASS are (its CuTe included): headers alone, no part of the installed package. The first of
#
#   1. ILLADA_CUTLASS_DIR, of CMake or of the environment: a checkout, its include folder, or an unpacked wheel;
#   2. an installed CMake package, find_package(NvidiaCutlass);
#   3. an installed wheel nvidia-cutlass, found by its path: what it would import is not needed;
#   4. that wheel, fetched by pip into the build folder without its dependencies, where ILLADA_CUTLASS_DOWNLOAD is on.

set(ILLADA_CUTLASS_OLDEST 4.0)
set(ILLADA_CUTLASS_WAYS "Any of these helps:\n"
  "  pip install --no-deps 'nvidia-cutlass>=${ILLADA_CUTLASS_OLDEST}'   (headers of 6 MB; its dependencies are not needed)\n"
  "  ILLADA_CUTLASS_DIR=/path/to/cutlass                 (a checkout of github.com/NVIDIA/cutlass, or its include folder)\n"
  "  ILLADA_CUDA=off                                     (a build for CPUs)")
string(CONCAT ILLADA_CUTLASS_WAYS ${ILLADA_CUTLASS_WAYS})

# The include folder in `dir`, a checkout, an include folder or an unpacked wheel; empty where there is none.
function(illada_cutlass_include result dir)
  set(${result} "" PARENT_SCOPE)
  foreach(candidate IN ITEMS "${dir}/include" "${dir}" "${dir}/cutlass_library/source/include")
    if(EXISTS "${candidate}/cutlass/version.h" AND EXISTS "${candidate}/cute/tensor.hpp")
      set(${result} "${candidate}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# MAJOR.MINOR.PATCH of the headers in an include folder.
function(illada_cutlass_version result include)
  set(version "")
  foreach(part IN ITEMS MAJOR MINOR PATCH)
    file(STRINGS "${include}/cutlass/version.h" line REGEX "^#define CUTLASS_${part} +[0-9]+")
    string(REGEX MATCH "[0-9]+" number "${line}")
    list(APPEND version "${number}")
  endforeach()
  list(JOIN version "." version)
  set(${result} "${version}" PARENT_SCOPE)
endfunction()

# The include folder of a wheel that `python` could import; empty where there is none. -I: also of the environment around
# pip's isolated one.
function(illada_cutlass_wheel result python)
  set(${result} "" PARENT_SCOPE)
  foreach(isolation IN ITEMS "-s" "-I")
    execute_process(COMMAND "${python}" ${isolation} -c "import sys; print(';'.join(path for path in sys.path if path))"
      OUTPUT_VARIABLE paths ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    foreach(path IN LISTS paths)
      illada_cutlass_include(include "${path}/cutlass_library/source")
      if(include)
        set(${result} "${include}" PARENT_SCOPE)
        return()
      endif()
    endforeach()
  endforeach()
endfunction()

# Fetches the wheel into `target` with the pip of `python`, or of the environment around pip's isolated one.
function(illada_cutlass_download result python target)
  set(${result} "" PARENT_SCOPE)
  illada_cutlass_include(include "${target}")
  if(NOT include)
    set(pip "${python}" -I -m pip)
    execute_process(COMMAND ${pip} --version OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
    if(failed)
      set(pip "${python}" -m pip)
    endif()
    message(STATUS "illada: fetching the headers of nvidia-cutlass (6 MB) by pip")
    execute_process(COMMAND ${pip} install --quiet --disable-pip-version-check --no-input --no-deps --no-compile
      --only-binary :all: --upgrade --target "${target}" "nvidia-cutlass>=${ILLADA_CUTLASS_OLDEST},<5"
      OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
    if(failed)
      message(STATUS "illada: pip could not: ${said}")
    endif()
    illada_cutlass_include(include "${target}")
  endif()
  set(${result} "${include}" PARENT_SCOPE)
endfunction()

# Sets `result` to the include folder and `result`_VERSION; an error where there is none. `python` may be empty.
function(illada_find_cutlass result python)
  set(dir "${ILLADA_CUTLASS_DIR}")
  if(NOT dir)
    set(dir "$ENV{ILLADA_CUTLASS_DIR}")
  endif()
  if(dir)
    get_filename_component(dir "${dir}" ABSOLUTE BASE_DIR "${CMAKE_SOURCE_DIR}")
    illada_cutlass_include(include "${dir}")
    if(NOT include)
      message(FATAL_ERROR "illada: ILLADA_CUTLASS_DIR is ${dir}, and neither it, its include nor its "
        "cutlass_library/source/include holds cutlass/version.h and cute/tensor.hpp.\n${ILLADA_CUTLASS_WAYS}")
    endif()
  endif()
  if(NOT include)
    find_package(NvidiaCutlass CONFIG QUIET)
    if(NvidiaCutlass_FOUND AND TARGET nvidia::cutlass::cutlass)
      get_target_property(folders nvidia::cutlass::cutlass INTERFACE_INCLUDE_DIRECTORIES)
      foreach(folder IN LISTS folders)
        if(NOT include)
          illada_cutlass_include(include "${folder}")
        endif()
      endforeach()
    endif()
  endif()
  if(NOT include AND python)
    illada_cutlass_wheel(include "${python}")
  endif()
  if(NOT include AND python AND ILLADA_CUTLASS_DOWNLOAD)
    illada_cutlass_download(include "${python}" "${CMAKE_BINARY_DIR}/nvidia-cutlass")
  endif()
  if(NOT include)
    message(FATAL_ERROR "illada: the CUDA kernels need the headers of CUTLASS ${ILLADA_CUTLASS_OLDEST} or newer, and there "
      "are none.\n${ILLADA_CUTLASS_WAYS}")
  endif()
  illada_cutlass_version(version "${include}")
  if(version VERSION_LESS ILLADA_CUTLASS_OLDEST)
    message(FATAL_ERROR "illada: CUTLASS ${version} was found in ${include}; ${ILLADA_CUTLASS_OLDEST} or newer is needed.\n"
      "${ILLADA_CUTLASS_WAYS}")
  endif()
  message(STATUS "illada: CUTLASS ${version} in ${include}")
  set(${result} "${include}" PARENT_SCOPE)
  set(${result}_VERSION "${version}" PARENT_SCOPE)
endfunction()
