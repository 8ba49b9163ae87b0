// A connection within the process: a worker and the reducer inside it, without a transport between
// them.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace reducer::server {

/// Frames given to the returned connection reach the acceptor's handler at once, on the caller's
/// thread, and its answers reach `handler` on the thread that answers; so calls of one handler may
/// come from several threads at once. Closing is told to both handlers through transport.post().
std::shared_ptr<transport::Connection> connectInProcess(transport::Transport& transport,
                                                        std::shared_ptr<transport::Handler> handler,
                                                        const transport::Acceptor& acceptor);

}  // namespace reducer::server
