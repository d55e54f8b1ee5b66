//! Ids and names of tasks: what is read prints the same text again, and its parts make the same id.

use pelton_core::id::{RequestId, TaskName, name_is_valid};

use crate::Input;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let number = u128::from(input.u64()) << 64 | u128::from(input.u64());
    let id = RequestId(number);
    assert_eq!(RequestId::parse(&id.to_string()), Some(id));
    assert_eq!(
        RequestId::new(id.cell(), id.accepted_ms(), id.seq(), id.slot()),
        id
    );

    let text = String::from_utf8_lossy(data);
    if let Some(id) = RequestId::parse(&text) {
        assert_eq!(id.to_string(), text);
    }
    match TaskName::parse(&text) {
        None => {}
        Some(TaskName::Request(id)) => {
            assert!(text.ends_with(&id.to_string()));
            assert!(text.starts_with(&id.to_string()) || text.contains('/'));
        }
        Some(TaskName::Given {
            function,
            key,
            task_id,
        }) => {
            for name in [Some(&function), key.as_ref(), Some(&task_id)] {
                assert!(name.is_none_or(|name| name_is_valid(name)));
            }
            let again = match &key {
                Some(key) => format!("{function}/{key}/{task_id}"),
                None => format!("{function}/{task_id}"),
            };
            assert_eq!(again, text);
            assert_eq!(RequestId::parse(&task_id), None, "that is an id, no name");
        }
    }
}
