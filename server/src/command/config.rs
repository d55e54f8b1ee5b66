//! `pelton config show`: every setting, and where it comes from.

use clap::{Args, Subcommand};

use crate::{
    command::{
        exit::{Exit, Failure, put, put_json},
        table::{Table, cell},
    },
    config::Config,
};

/// The settings: defaults < file < PELTON_SECTION__KEY < flags
#[derive(Args, Clone, Debug)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum ConfigCommand {
    /// Print each setting, its value, and where it comes from
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl ConfigArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        let ConfigCommand::Show { json } = self.command;
        json
    }
}

/// Prints the settings.
pub fn run(args: &ConfigArgs, config: &Config) -> Result<Exit, Failure> {
    if args.json() {
        put_json(&config.to_json())?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(["SETTING", "VALUE", "FROM"]);
    for (name, value, source) in config.rows() {
        table.row([name, cell(&value), source.to_string()]);
    }
    put(table.render())?;
    Ok(Exit::Ok)
}
