//! One file per command.

pub mod bench;

pub mod demo;

pub mod log;

pub mod serve;
