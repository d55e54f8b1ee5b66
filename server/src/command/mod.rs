//! One file per command; `exit`, `connect`, `table`, `bar` and `time` are what they share.

pub mod exit;

pub mod connect;

pub mod table;

pub mod bar;

pub mod time;

pub mod serve;

mod starting;

pub mod demo;

pub mod log;

pub mod bench;

pub mod task;

pub mod function;

pub mod tenant;

pub mod stats;

pub mod key;

pub mod executor;

pub mod doctor;

pub mod backup;

pub mod restore;

pub mod config;

pub mod completions;
