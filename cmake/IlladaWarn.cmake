# A warning that its reader may not see: pip hides the output of a build that succeeds. So it is in a file as well, which
# setup.py shows on the terminal.
function(illada_warn text)
  foreach(index RANGE 1 ${ARGC}) # ${ARGN} would lose semicolons
    string(APPEND text "${ARGV${index}}")
  endforeach()
  message(WARNING "illada: ${text}")
  if(NOT CMAKE_SCRIPT_MODE_FILE) # tests run single files of this folder as scripts
    file(APPEND "${CMAKE_BINARY_DIR}/illada-warnings.txt" "illada: ${text}\n")
  endif()
endfunction()
