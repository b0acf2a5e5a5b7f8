//! critest, the conformance tests of CRI, against a node: the images that it
//! asks for, its run and what its report says. `make critest` calls it.

pub mod images;
pub mod report;
pub mod run;

pub use report::Report;
pub use run::{Options, run};
