// Loops over torch's own OpenMP threads, as many as `torch.set_num_threads` says.
//
// torch brings its OpenMP runtime along and makes its symbols global. Linking another would put two thread pools on the
// same cores, each waiting busily for the other; so ours is found where torch has left it, by any compiler, and where
// there is none a loop runs on one thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace vppo {

// Runs `task(state)` on every thread.
void on_every_thread(void (*task)(void*), void* state);

// Calls `body(begin, end)` for pieces of at most `grain` that cover 0..count-1. Which thread takes which is left to
// chance: a piece's result must depend on nothing but itself.
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
