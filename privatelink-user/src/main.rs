//! `privatelink`: the agent and the command line.

fn main() -> std::process::ExitCode {
    privatelink::cli::main().into()
}
