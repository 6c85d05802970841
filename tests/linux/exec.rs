//! Programs of the guest, run from the host.

use forkvm::agent::protocol::Exit;

use super::common::need_kvm;
use super::machine::{Machine, run, sh};

#[test]
fn a_program_has_its_input_outputs_and_status() {
    need_kvm!();
    let machine = Machine::restore(1);
    assert_eq!(sh(&machine, "uname -s"), "Linux");
    let said = run(
        &machine,
        &["sh", "-c", "cat; echo no >&2; exit 7"],
        b"yes\n",
    );
    assert_eq!(
        (said.exit, &*said.out, &*said.err),
        (Exit::Code(7), "yes\n", "no\n")
    );
    let said = run(&machine, &["sh", "-c", "kill -9 $$"], b"");
    assert_eq!(said.exit, Exit::Signal(9));
}

#[test]
fn a_program_that_is_not_there_is_refused_by_name() {
    need_kvm!();
    let machine = Machine::restore(1);
    let exec = forkvm::agent::protocol::Exec {
        argv: vec!["/bin/nothing".into()],
        ..Default::default()
    };
    let refused = machine.agent().exec(&exec).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("/bin/nothing"), "{refused}");
}

#[test]
fn a_file_goes_in_and_comes_out_as_it_was() {
    need_kvm!();
    let machine = Machine::restore(1);
    let content: Vec<u8> = (0..300_000u32)
        .map(|at| (at.wrapping_mul(at) >> 7) as u8)
        .collect();
    let (agent, path) = (machine.agent(), "/tmp/file".as_ref());
    agent
        .put(path, 0o640, content.len() as u64, &mut &content[..])
        .unwrap();
    let mut back = Vec::new();
    let got = agent.get(path, &mut back).unwrap();
    assert_eq!(got.mode & 0o7777, 0o640);
    assert!(back == content, "{} of {} bytes", back.len(), content.len());
}
