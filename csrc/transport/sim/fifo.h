// A queue that costs no memory while it is empty: a simulation has millions of them, and a
// std::deque takes half a kilobyte from the start.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace reducer::transport::sim {

/// Not thread safe.
template <class T>
class Fifo {
 public:
  bool empty() const { return head_ == items_.size(); }
  std::size_t size() const { return items_.size() - head_; }
  T& front() { return items_[head_]; }
  T& back() { return items_.back(); }
  T& operator[](std::size_t index) { return items_[head_ + index]; }

  void push_back(T item) { items_.push_back(std::move(item)); }
  void pop_back() {
    items_.pop_back();
    if (empty()) clear();
  }
  T pop_front() {
    T item = std::move(items_[head_++]);
    if (empty()) {
      clear();
    } else if (head_ > kKept && head_ * 2 > items_.size()) {
      items_.erase(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(head_));
      head_ = 0;
    }
    return item;
  }
  void clear() {
    std::vector<T>().swap(items_);
    head_ = 0;
  }
  auto begin() { return items_.begin() + static_cast<std::ptrdiff_t>(head_); }
  auto end() { return items_.end(); }

 private:
  static constexpr std::size_t kKept = 32;
  std::vector<T> items_;
  std::size_t head_ = 0;
};

}  // namespace reducer::transport::sim
