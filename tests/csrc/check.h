// CHECK(condition, details...) prints and counts what is not true; main returns failed_checks().
#pragma once

#include <iostream>

inline int& failed_checks() {
  static int count = 0;
  return count;
}

template <class... Details>
void report_failure(const char* file, int line, const char* condition, const Details&... details) {
  if (++failed_checks() > 20) return;  // more of them tell nothing new
  std::cerr << file << ":" << line << ": not true: " << condition;
  ((std::cerr << " | " << details), ...);
  std::cerr << "\n";
}

#define CHECK(condition, ...)                                                      \
  do {                                                                             \
    if (!(condition)) report_failure(__FILE__, __LINE__, #condition, __VA_ARGS__); \
  } while (false)
