// loaded.h - the libraries that this process has loaded: where ggml is looked for.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace gear {

// A library of this process, which stays loaded as long as this does.
class loaded_library {
  public:
    loaded_library() = default;
    loaded_library(std::string path, void * handle);

    explicit operator bool() const { return handle_ != nullptr; }

    // A function that the library or one that it depends on exports; nullptr: none does.
    void *              symbol(const char * name) const;
    void *              handle() const { return handle_.get(); }
    const std::string & path() const { return path_; }
    // It stays loaded as long as the process lives.
    void                pin() const;

  private:
    std::string           path_;
    std::shared_ptr<void> handle_;
};

// All of them, whatever they are called and whether or not their symbols are global; the program itself first.
std::vector<loaded_library> loaded_libraries();
// The one that an address of code or data is in; empty: in none.
loaded_library              library_at(const void * address);
// Its file, "" when it is in none.
std::string                 file_at(const void * address);

} // namespace gear
