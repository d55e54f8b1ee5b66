//! Who may connect, and what a key allows.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pelton_client::{
    Attempt, Client, ClientOptions, Code, Error, Executor, Operation, Task, TaskName, Trust,
};
use pelton_tests::{Server, ServerOptions, Worker};
use serde_json::{Value, json};

struct Key {
    id: String,
    secret: String,
}

async fn create(client: &Client, wish: Value) -> Key {
    let made = client
        .query(Operation::KeyCreate, &wish.to_string())
        .await
        .unwrap();
    let made: Value = serde_json::from_str(&made).unwrap();
    Key {
        id: made["key"].as_str().unwrap().to_owned(),
        secret: made["secret"].as_str().unwrap().to_owned(),
    }
}

fn code<T>(result: Result<T, Error>) -> Code {
    match result {
        Ok(_) => Code::Ok,
        Err(error) => error.code(),
    }
}

async fn hello(options: ClientOptions) -> Code {
    code(Client::connect(options).await)
}

#[tokio::test]
async fn a_server_with_keys_serves_nobody_without_a_good_one() {
    let mut server = Server::start(ServerOptions::default());
    let first = server.client().await;
    let admin = create(
        &first,
        json!({"name": "operator", "scopes": ["submit", "admin"]}),
    )
    .await;
    let good = server.options().key(&admin.secret);
    assert_eq!(hello(server.options()).await, Code::Unauthenticated);
    for wrong in [
        "x",
        "pelton_",
        &admin.secret[1..],
        &format!("{}0", admin.secret),
    ] {
        let refused = hello(server.options().key(wrong)).await;
        assert_eq!(refused, Code::Unauthenticated, "{wrong}");
    }
    assert_eq!(hello(good.clone()).await, Code::Ok);

    server.kill9();
    server.restart();
    assert_eq!(hello(server.options()).await, Code::Unauthenticated);
    let admin_client = Client::connect(good).await.unwrap();
    let other = create(&admin_client, json!({})).await;
    assert_eq!(hello(server.options().key(&other.secret)).await, Code::Ok);
    let wish = json!({"key": other.id}).to_string();
    admin_client
        .query(Operation::KeyRevoke, &wish)
        .await
        .unwrap();
    let revoked = hello(server.options().key(&other.secret)).await;
    assert_eq!(revoked, Code::Unauthenticated);
    let listed = admin_client.query(Operation::KeyList, "{}").await.unwrap();
    assert!(
        listed.contains(&admin.id) && !listed.contains(&other.id),
        "{listed}"
    );
    assert!(!listed.contains(&admin.secret));
    let again = code(admin_client.query(Operation::KeyRevoke, &wish).await);
    assert_eq!(again, Code::NotFound);
}

#[tokio::test]
async fn a_key_allows_what_its_scopes_name_and_nothing_else() {
    let server = Server::start(ServerOptions::default());
    let open = server.client().await;
    let admin = create(&open, json!({"scopes": ["admin", "manage"]})).await;
    let admin = Client::connect(server.options().key(admin.secret))
        .await
        .unwrap();
    let set = r#"{"function": "f"}"#;
    admin.query(Operation::FunctionSet, set).await.unwrap();
    let submit = create(&admin, json!({"scopes": ["submit"]})).await.secret;
    let execute = create(&admin, json!({"scopes": ["execute"]})).await.secret;
    let manage = create(&admin, json!({"scopes": ["manage"]})).await.secret;

    let submitter = Client::connect(server.options().key(&submit))
        .await
        .unwrap();
    let task = submitter
        .submit("f", Task::new("x"))
        .await
        .unwrap()
        .request_id;
    let task = TaskName::Request(task);
    assert_eq!(
        code(submitter.stop(&task, Duration::ZERO).await),
        Code::PermissionDenied
    );
    for (operation, json) in [
        (Operation::FunctionSet, set),
        (Operation::FunctionRemove, set),
        (Operation::TenantList, "{}"),
        (Operation::TenantSet, r#"{"tenant": "t"}"#),
        (Operation::KeyList, "{}"),
        (Operation::KeyCreate, "{}"),
        (Operation::KeyRevoke, r#"{"key": "k"}"#),
    ] {
        let refused = code(submitter.query(operation, json).await);
        assert_eq!(refused, Code::PermissionDenied, "{operation:?}");
    }
    let refused = Executor::connect(server.options().key(&submit)).await;
    assert_eq!(code(refused), Code::PermissionDenied);

    let executor = Client::connect(server.options().key(&execute))
        .await
        .unwrap();
    let refused = executor.submit("f", Task::new("y")).await;
    assert_eq!(code(refused), Code::PermissionDenied);
    assert_eq!(
        code(executor.query(Operation::FunctionSet, set).await),
        Code::PermissionDenied
    );
    assert_eq!(
        code(executor.stop(&task, Duration::ZERO).await),
        Code::PermissionDenied
    );
    let run = async |_: Attempt| Ok(Vec::new());
    let _worker = Worker::of(server.options().key(&execute), "f", 1, run).await;
    assert!(
        submitter
            .wait(&task, Duration::from_secs(20))
            .await
            .unwrap()
            .succeeded()
    );

    let manager = Client::connect(server.options().key(&manage))
        .await
        .unwrap();
    manager.query(Operation::FunctionSet, set).await.unwrap();
    assert_eq!(
        code(manager.stop(&task, Duration::ZERO).await),
        Code::FailedPrecondition
    );
    assert_eq!(
        code(manager.query(Operation::KeyList, "{}").await),
        Code::PermissionDenied
    );
    assert_eq!(
        code(manager.submit("f", Task::new("z")).await),
        Code::PermissionDenied
    );
}

#[tokio::test]
async fn a_key_speaks_for_its_tenants_only() {
    let server = Server::start(ServerOptions::default());
    let open = server.client().await;
    let wish = json!({"scopes": ["admin", "manage", "submit"]});
    let admin = create(&open, wish).await.secret;
    let admin = Client::connect(server.options().key(admin)).await.unwrap();
    let one = create(&admin, json!({"tenants": ["acme"]})).await.secret;
    let two = create(&admin, json!({"tenants": ["acme", "bolt"]}))
        .await
        .secret;

    let acme = Client::connect(server.options().key(&one)).await.unwrap();
    acme.query(Operation::FunctionSet, r#"{"function": "f"}"#)
        .await
        .unwrap();
    let task = acme.submit("f", Task::new("x")).await.unwrap().request_id;
    let task = TaskName::Request(task);
    let named = server.options().key(&two).tenant("acme");
    let named = Client::connect(named).await.unwrap();
    named.get(&task).await.unwrap();
    let bolt = server.options().key(&two).tenant("bolt");
    let bolt = Client::connect(bolt).await.unwrap();
    // The tenant has to be there before anything of it can be asked for.
    bolt.query(Operation::FunctionSet, r#"{"function": "f"}"#)
        .await
        .unwrap();
    assert_eq!(code(bolt.get(&task).await), Code::NotFound);
    assert_eq!(code(admin.get(&task).await), Code::NotFound);

    let other = server.options().key(&one).tenant("bolt");
    assert_eq!(hello(other).await, Code::PermissionDenied);
    assert_eq!(
        hello(server.options().key(&two)).await,
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn a_server_with_another_certificate_is_not_spoken_with() {
    let server = Server::start(ServerOptions::default());
    let other = server.options().trust(Trust::Fingerprint([7; 32]));
    let refused = Client::connect(other).await;
    assert!(matches!(refused, Err(Error::Unreachable(_))), "{refused:?}");
    let ca = server.data().join("quic-cert.pem");
    let good = server.options().trust(Trust::CaFile(ca));
    assert_eq!(hello(good).await, Code::Ok);
}
