//! `drupe-agent`: PID 1 of a pod's guest.
#![forbid(unsafe_code)]

fn main() {
    drupe_agent::main()
}
