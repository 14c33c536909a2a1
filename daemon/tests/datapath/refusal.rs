//! What is told when the kernel refuses a program.

use aya::{EbpfLoader, programs::Program};
use object::{Endianness, Object, ObjectSection, ObjectSymbol, read::elf::ElfFile64};
use reeve::datapath::Refusal;

/// The object that the daemon loads.
const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reeve-ebpf"));
const PROGRAM: &str = "reeve_peername4";

/// `r0 = r5`, which reads what nothing has written.
const UNWRITTEN: [u8; 8] = [0xbf, 0x50, 0, 0, 0, 0, 0, 0];

#[test]
fn a_refusal_of_the_running_kernel_is_five_lines_with_the_verifiers_last() {
    let mut object = OBJECT.to_vec();
    let at = code_of(PROGRAM);
    object[at..at + UNWRITTEN.len()].copy_from_slice(&UNWRITTEN);
    let mut loader = EbpfLoader::new();
    loader.map_max_entries("EVENTS", 4096);
    let mut ebpf = loader.load(&object).unwrap();
    let Some(Program::CgroupSockAddr(program)) = ebpf.program_mut(PROGRAM) else {
        panic!("the object has no {PROGRAM}");
    };
    let error = program.load().unwrap_err();
    let text = Refusal::of_program(PROGRAM, &error).to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    assert!(lines[1].ends_with(PROGRAM), "{text}");
    assert!(lines[2].contains("R5 !read_ok"), "{text}");
    assert!(lines[3].contains("Linux "), "{text}");
}

/// Where a function's code lies in the object.
fn code_of(name: &str) -> usize {
    let file = ElfFile64::<Endianness>::parse(OBJECT).unwrap();
    let symbol = file
        .symbols()
        .find(|symbol| symbol.name() == Ok(name))
        .unwrap();
    let section = file.section_by_index(symbol.section_index().unwrap());
    let (start, _) = section.unwrap().file_range().unwrap();
    (start + symbol.address()) as usize
}
