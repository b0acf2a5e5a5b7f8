//! Images are mounted by the host's kernel and compared with what GNU tar
//! makes of the same archive: root, loop devices, erofs-utils and tar needed.

mod bounds;
mod compare;
mod inherit;
mod semantics;
mod stream;
mod support;
