// Loops over torch's own OpenMP threads, as many as `torch.set_num_threads` says.
//
// torch loads an OpenMP runtime whose symbols are global. A second runtime would put a second pool of busily waiting
// threads on the same cores. So this library links none and looks torch's up by name, whatever compiler it was built
// with; where there is none, a loop runs on one thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace vppo {

// Runs `task(state)` on every thread.
void on_every_thread(void (*task)(void*), void* state);

// Calls `body(begin, end)` for pieces of at most `grain` that cover 0..count-1. Any thread may take any piece, so a
// piece's result must depend on nothing but the piece.
template <typename Body>
void parallel_for(std::int64_t count, std::int64_t grain, const Body& body) {
  grain = std::max<std::int64_t>(grain, 1);
  if (count <= grain) {
    if (count > 0) body(std::int64_t{0}, count);
    return;
  }
  struct State {
    const Body& body;
    std::int64_t count, grain;
    std::atomic<std::int64_t> next{0};
  } state{body, count, grain, {}};
  on_every_thread(
      [](void* given) {
        State& all = *static_cast<State*>(given);
        for (;;) {
          const std::int64_t begin = all.next.fetch_add(all.grain);
          if (begin >= all.count) return;
          all.body(begin, std::min(begin + all.grain, all.count));
        }
      },
      &state);
}

}  // namespace vppo
