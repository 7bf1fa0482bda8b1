# Where the headers of CUTLASS are (its CuTe included): headers alone, no part of the installed package. The first of
#
#   1. ILLADA_CUTLASS_DIR, of CMake or of the environment: a checkout, its include folder, or an unpacked wheel;
#   2. an installed CMake package, find_package(NvidiaCutlass);
#   3. an installed wheel nvidia-cutlass, found by its path: what it would import is not needed;
#   4. that wheel, fetched into the build folder without its dependencies, where ILLADA_CUTLASS_DOWNLOAD is on.
#
# One that is too old is an error, not a reason to look further: a build takes what its machine says, or nothing.

include("${CMAKE_CURRENT_LIST_DIR}/IlladaWarn.cmake")

set(ILLADA_CUTLASS_OLDEST 4.0)
set(ILLADA_CUTLASS_UNTESTED 5)
string(CONCAT ILLADA_CUTLASS_WAYS "Any of these helps:\n"
  "  ILLADA_CUTLASS_DIR=/path/to/cutlass            a checkout of github.com/NVIDIA/cutlass, or its include folder\n"
  "  pip install --no-deps 'nvidia-cutlass>=${ILLADA_CUTLASS_OLDEST},<${ILLADA_CUTLASS_UNTESTED}' headers, 6 MB; needs no dependencies\n"
  "  ILLADA_CUTLASS_DOWNLOAD=on                     lets the build fetch them (with CMake alone: -D before it)\n"
  "  ILLADA_CUDA=off                                a build for CPUs (with CMake alone: -D before it)")

# The include folder in `dir`, a checkout, an include folder or an unpacked wheel; empty where there is none.
function(illada_cutlass_include result dir)
  set(${result} "" PARENT_SCOPE)
  foreach(candidate IN ITEMS "${dir}/include" "${dir}" "${dir}/cutlass_library/source/include")
    if(EXISTS "${candidate}/cutlass/version.h")
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

# The include folder of an installed CMake package; empty where there is none.
function(illada_cutlass_package result)
  set(include "")
  find_package(NvidiaCutlass CONFIG QUIET)
  if(TARGET nvidia::cutlass::cutlass)
    get_target_property(folders nvidia::cutlass::cutlass INTERFACE_INCLUDE_DIRECTORIES)
    foreach(folder IN LISTS folders)
      if(NOT include)
        illada_cutlass_include(include "${folder}")
      endif()
    endforeach()
  endif()
  set(${result} "${include}" PARENT_SCOPE)
endfunction()

# The include folder of a wheel that `python` could import; empty where there is none. With -E it is the Python around
# pip's isolated environment, which is made by variables.
function(illada_cutlass_wheel result python)
  set(${result} "" PARENT_SCOPE)
  foreach(isolation IN ITEMS "" "-E")
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

# Fetches the headers into `target`: by the pip around an isolated environment, the pip in it, or the uv that made it,
# each with its settings of indexes and proxies. Where that fails, `reason` says why.
function(illada_cutlass_download result reason python target)
  set(${reason} "" PARENT_SCOPE)
  illada_cutlass_include(include "${target}")
  if(include)
    set(${result} "${include}" PARENT_SCOPE)
    return()
  endif()
  set(pip "")
  foreach(isolation IN ITEMS "-I" "")
    execute_process(COMMAND "${python}" ${isolation} -m pip --version OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
    if(NOT failed AND NOT pip)
      set(pip "${python}" ${isolation} -m pip)
    endif()
  endforeach()
  set(part "${target}.part") # what is interrupted must not look like headers
  set(what --no-deps --only-binary :all: "nvidia-cutlass>=${ILLADA_CUTLASS_OLDEST},<${ILLADA_CUTLASS_UNTESTED}")
  if(pip)
    set(command ${pip} download -qq --disable-pip-version-check --no-input --dest "${part}" ${what})
  elseif(DEFINED ENV{UV})
    set(command "$ENV{UV}" pip install --quiet --python "${python}" --target "${part}" ${what})
  else()
    set(${result} "" PARENT_SCOPE)
    set(${reason} "${python} has no pip" PARENT_SCOPE)
    return()
  endif()
  message(STATUS "illada: fetching the headers of nvidia-cutlass, 6 MB")
  file(REMOVE_RECURSE "${part}" "${target}")
  file(MAKE_DIRECTORY "${part}")
  execute_process(COMMAND ${command} OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE status
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  string(REGEX REPLACE "([][*?])" "[\\1]" literal "${part}") # a folder's name may hold what GLOB reads as a pattern
  file(GLOB wheel "${literal}/nvidia_cutlass-*.whl")
  if(wheel)
    file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${part}"
      PATTERNS "cutlass_library/source/include/*" "*.dist-info/*")
    file(REMOVE "${wheel}")
  endif()
  illada_cutlass_include(include "${part}")
  if(include)
    file(RENAME "${part}" "${target}")
    illada_cutlass_include(include "${target}")
  endif()
  file(REMOVE_RECURSE "${part}")
  if(NOT said)
    string(REPLACE ";" " " command "${command}")
    set(said "${command}: ${status}, and no headers in ${part}")
  endif()
  set(${result} "${include}" PARENT_SCOPE)
  set(${reason} "${said}" PARENT_SCOPE)
endfunction()

# Sets `result` to the include folder and `result`_VERSION; an error where there is none. `python` may be empty.
function(illada_find_cutlass result python)
  set(include "")
  set(why "")
  set(named "${ILLADA_CUTLASS_DIR}")
  if(NOT named)
    set(named "$ENV{ILLADA_CUTLASS_DIR}")
  endif()
  if(named)
    get_filename_component(dir "${named}" ABSOLUTE BASE_DIR "${CMAKE_SOURCE_DIR}")
    illada_cutlass_include(include "${dir}")
    if(NOT include)
      message(FATAL_ERROR "illada: ILLADA_CUTLASS_DIR is ${dir}, and neither it, its include nor its "
        "cutlass_library/source/include holds cutlass/version.h.\n${ILLADA_CUTLASS_WAYS}")
    endif()
  endif()
  if(NOT include)
    illada_cutlass_package(include)
  endif()
  if(NOT include AND python)
    illada_cutlass_wheel(include "${python}")
  endif()
  if(NOT include AND python AND ILLADA_CUTLASS_DOWNLOAD)
    illada_cutlass_download(include why "${python}" "${CMAKE_BINARY_DIR}/nvidia-cutlass")
    string(REPLACE "\n" "\n  " why "\nThey could not be fetched either:\n${why}")
  endif()
  if(NOT include)
    message(FATAL_ERROR "illada: the CUDA kernels need the headers of CUTLASS ${ILLADA_CUTLASS_OLDEST} or newer, and "
      "there are none: ILLADA_CUTLASS_DIR is not set, and neither a CMake package NvidiaCutlass nor a wheel "
      "nvidia-cutlass is installed.${why}\n${ILLADA_CUTLASS_WAYS}")
  endif()
  illada_cutlass_version(version "${include}")
  if(NOT version MATCHES "^[0-9]+\\.[0-9]+\\.[0-9]+$")
    message(FATAL_ERROR "illada: ${include}/cutlass/version.h names no version of CUTLASS.\n${ILLADA_CUTLASS_WAYS}")
  endif()
  if(version VERSION_LESS ILLADA_CUTLASS_OLDEST)
    message(FATAL_ERROR "illada: CUTLASS ${version} was found in ${include}; ${ILLADA_CUTLASS_OLDEST} or newer is "
      "needed.\n${ILLADA_CUTLASS_WAYS}")
  endif()
  if(NOT EXISTS "${include}/cute/tensor.hpp")
    message(FATAL_ERROR "illada: CUTLASS ${version} in ${include} is not complete: cute/tensor.hpp is missing.\n"
      "${ILLADA_CUTLASS_WAYS}")
  endif()
  if(version VERSION_GREATER_EQUAL ILLADA_CUTLASS_UNTESTED)
    illada_warn("CUTLASS ${version} was found in ${include}; the kernels were tested with versions below "
      "${ILLADA_CUTLASS_UNTESTED}. If they do not compile, ILLADA_CUTLASS_DIR names another.")
  endif()
  message(STATUS "illada: CUTLASS ${version} in ${include}")
  set(${result} "${include}" PARENT_SCOPE)
  set(${result}_VERSION "${version}" PARENT_SCOPE)
endfunction()
