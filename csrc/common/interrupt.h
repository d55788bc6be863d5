// Whether a long computation is to stop because somebody pressed Ctrl-C.
#pragma once

#include "host_device.h"

namespace cacr {

// To be asked between blocks of work, by any thread; yes is the answer from then on. What is computed is then of no
// use, and the caller, who knows, throws it away.
struct Interrupt {
  bool (*asked)(void* state) = nullptr;
  void* state = nullptr;

  CACR_HOST_DEVICE bool operator()() const { return asked && asked(state); }
};

}  // namespace cacr
