//! What is open of a VM's files, and what ends it.

use agentvm::error::Code;
use agentvm::session::ReadRange;
use agentvm::vm::files::{Record, Task};
use agentvm::vm::{GuestPath, User};

use super::fixture::{World, code, within};

fn path(text: &str) -> GuestPath {
    GuestPath::new(text).unwrap()
}

async fn names(world: &World) -> Vec<String> {
    let task = Task::List {
        path: GuestPath::home(),
        recursive: false,
        skip_unreadable: false,
        at_leisure: false,
    };
    let mut records = within(world.vm.file_records(task, User::User))
        .await
        .unwrap();
    let mut names = Vec::new();
    while let Some(batch) = within(records.next()).await.unwrap() {
        for record in batch {
            let Record::Entry { path, .. } = record else {
                panic!("{record:?}");
            };
            names.push(String::from_utf8(path).unwrap());
        }
    }
    names.sort();
    names
}

#[tokio::test]
async fn an_upload_that_nobody_finishes_leaves_nothing() {
    let world = World::new().await;
    let begun = world.vm.upload(path("f"), None, User::User);
    let upload = within(begun).await.unwrap();
    within(upload.write(b"half".to_vec())).await.unwrap();
    let gone = upload.gone();
    drop(upload);
    within(gone).await.unwrap();
    assert_eq!(names(&world).await, [] as [&str; 0]);
    world.close().await;
}

#[tokio::test]
async fn an_end_of_the_vm_waits_until_nothing_of_an_upload_is_left() {
    let world = World::new().await;
    let begun = world.vm.upload(path("f"), None, User::User);
    let upload = within(begun).await.unwrap();
    within(upload.write(b"half".to_vec())).await.unwrap();
    within(world.vm.sleep()).await.unwrap();
    assert_eq!(code(within(upload.gone()).await), Code::Aborted);
    assert_eq!(code(within(upload.write(Vec::new())).await), Code::Aborted);
    assert_eq!(code(within(upload.finish()).await), Code::Aborted);
    assert_eq!(names(&world).await, [] as [&str; 0]);
    world.close().await;
}

#[tokio::test]
async fn the_end_of_its_client_ends_what_is_open() {
    let world = World::new().await;
    let file = path("f");
    let written = world.vm.write_file(&file, vec![1], User::User);
    within(written).await.unwrap();
    let opened = world.vm.download(file, ReadRange::default(), User::User);
    let mut download = within(opened).await.unwrap();
    let watching = world.vm.watch_files(GuestPath::home(), true, User::User);
    let mut changes = within(watching).await.unwrap();
    within(world.client.close()).await.unwrap();
    let ended = [Code::ClientClosed, Code::Aborted];
    assert!(ended.contains(&code(within(download.read()).await)));
    assert!(ended.contains(&code(within(changes.next()).await)));
}
