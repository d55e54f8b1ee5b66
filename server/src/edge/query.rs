//! The rare frames: waits and stops, and the queries with a JSON body. Each is answered by a task of its own, so that
//! none holds up the frames behind it.

use std::{rc::Rc, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use pelton_core::{
    config::{FunctionConfig, OnFailure, TenantConfig, Wish},
    error::Code,
    event::{Query as TaskQuery, Reply, Target},
    id::{FunctionId, RequestId, TaskName, TenantId},
    limits::{CELL_COUNT, STOP_GRACE, STOP_GRACE_MS_DEFAULT, STOP_GRACE_MS_MAX},
    state::State,
};
use pelton_engine::{
    Quarantine,
    history::HistoryStats,
    info::{InfoReply, TaskInfo, sum},
    listing::{ListFilter, Listing},
    stats::{ShardStats, Stage},
};
use pelton_net::{
    error::ProtocolError,
    frame::{Frame, FrameType},
    item::Items,
    query::{Operation, Query, QueryAnswer},
    submit::{Finished, Stop, StopAnswer, TaskRef, TaskStatus, Wait},
};
use serde_json::{Map, Value, json};

use crate::{
    edge::{
        hub::{Answered, Hub, write_items},
        session::Session,
    },
    keys::{Scopes, TenantSet},
};

/// Rows of a page where the caller does not say.
const PAGE_ROWS: u32 = 100;
const PAGE_ROWS_MAX: u32 = 1_000;
/// Parts of one page: with a prefix or a tag a part may be short, and after so many of them the page is as it is.
const LISTINGS_MAX: u32 = 32;
/// Digits of a cursor.
const CURSOR_DIGITS: usize = 32;

/// What any wait gets, so that the shard's answer about a terminal task arrives within it.
const WAIT_MIN: Duration = Duration::from_millis(100);

/// A refusal: the code and what to do.
type Refusal = (Code, String);

const NO_TASK: &str = "there is no such task, or it is no longer kept";
const SHARD_GONE: &str = "the task's shard does not answer: look at `pelton doctor`";

impl Session {
    pub(crate) fn on_question(
        self: &Rc<Self>,
        hub: &Rc<Hub>,
        frame: Frame,
    ) -> Result<(), ProtocolError> {
        // What is broken is refused before anything is started.
        match frame.kind {
            FrameType::Wait => Wait::parse(&frame).map(|_| ())?,
            FrameType::Stop => {
                // An answer to a stop has no room for a sentence.
                let stops = Items::<Stop>::parse(&frame)?;
                if stops.iter().any(|stop| stop.grace_ms > STOP_GRACE_MS_MAX) {
                    self.error(frame.tag, Code::InvalidArgument, STOP_GRACE);
                    return Ok(());
                }
            }
            _ => Query::parse(&frame).map(|_| ())?,
        }
        if !self.begin_question() {
            self.error(
                frame.tag,
                Code::ResourceExhausted,
                "256 questions of this session are unanswered: wait for some of them",
            );
            return Ok(());
        }
        let session = Rc::clone(self);
        let hub = Rc::clone(hub);
        tokio::task::spawn_local(async move {
            match frame.kind {
                FrameType::Wait => session.wait(&hub, &frame).await,
                FrameType::Stop => session.stop(&hub, &frame).await,
                _ => session.answer_query(&hub, &frame).await,
            }
            session.end_question();
        });
        Ok(())
    }

    async fn wait(&self, hub: &Hub, frame: &Frame) {
        let Ok(wait) = Wait::parse(frame) else {
            return;
        };
        let target = match wait.task {
            TaskRef::Request(request) => Ok(Target::Request(request)),
            TaskRef::Given {
                function,
                key,
                task_id,
            } => self.given(hub, function, key, task_id),
        };
        let answered = match target {
            Err(refusal) => Err(refusal),
            Ok(target) => {
                let named = target.clone();
                let time = Duration::from_millis(u64::from(wait.timeout_ms)).max(WAIT_MIN);
                let question = self.question(hub, target, |target| TaskQuery::Wait { target });
                match tokio::time::timeout(time, question).await {
                    Ok(Ok(Answered::Info(InfoReply::NotHeld { request }))) => self
                        .get_from_history(hub, named, request)
                        .await
                        .map(|task| Answered::Info(InfoReply::Task(task))),
                    Ok(answered) => answered,
                    Err(_) => Err((
                        Code::DeadlineExceeded,
                        "the task is not terminal yet: wait again".to_owned(),
                    )),
                }
            }
        };
        let answered = match answered {
            Ok(answered) => answered,
            Err((code, text)) => return self.error(frame.tag, code, &text),
        };
        match answered {
            Answered::Finished {
                request,
                status,
                code,
                attempts,
                error,
                result,
            } => self.finished(
                frame.tag,
                request,
                (status, code, attempts, &error),
                wait.with_result.then_some(&result[..]),
            ),
            Answered::Info(InfoReply::Task(task)) => match status_of(task.view.state) {
                Some(status) => self.finished(
                    frame.tag,
                    task.view.request,
                    (status, task.code, task.view.token.attempt, &task.error),
                    wait.with_result.then_some(&task.result[..]),
                ),
                None => self.error(frame.tag, Code::Internal, "the task has no status"),
            },
            Answered::Reply(Reply::Refused { code, what }) => self.error(frame.tag, code, what),
            Answered::Reply(_) | Answered::Info(_) => {
                self.error(
                    frame.tag,
                    Code::Internal,
                    "a wait was answered with something else",
                );
            }
        }
    }

    fn finished(
        &self,
        tag: u64,
        request_id: RequestId,
        (status, code, attempts, error): (TaskStatus, Code, u16, &str),
        result: Option<&[u8]>,
    ) {
        let item = Finished {
            tag,
            index: 0,
            request_id,
            status,
            code,
            attempts,
            error,
            result,
        };
        self.write(|out| write_items(out, FrameType::Finished, tag, [item].into_iter()));
    }

    async fn stop(&self, hub: &Hub, frame: &Frame) {
        if !self.scopes.manage() {
            return self.forbidden(frame.tag, "manage");
        }
        let Ok(items) = Items::<Stop>::parse(frame) else {
            return;
        };
        let mut answers = Vec::with_capacity(items.len());
        for item in items.iter() {
            let target = Target::Request(item.request_id);
            let (code, status) = match self.stop_one(hub, target, item.grace_ms).await {
                Ok(status) => (Code::Ok, status_of(status)),
                Err((code, _)) => (code, None),
            };
            answers.push(StopAnswer {
                request_id: item.request_id,
                code,
                status,
            });
        }
        self.write(|out| {
            write_items(out, FrameType::StopAnswer, frame.tag, answers.into_iter());
        });
    }

    async fn stop_one(&self, hub: &Hub, target: Target, grace_ms: u32) -> Result<State, Refusal> {
        let question = |target| TaskQuery::Stop { target, grace_ms };
        match self.question(hub, target.clone(), question).await? {
            Answered::Info(InfoReply::NotHeld { request }) => {
                self.get_from_history(hub, target, request).await?;
                Err((
                    Code::FailedPrecondition,
                    "the task has ended or is being stopped".to_owned(),
                ))
            }
            Answered::Reply(Reply::Done { state: Some(state) }) => Ok(state),
            Answered::Reply(Reply::Refused { code, what }) => Err((code, what.to_owned())),
            Answered::Reply(_) | Answered::Info(_) | Answered::Finished { .. } => Err((
                Code::Internal,
                "a stop was answered with something else".to_owned(),
            )),
        }
    }

    async fn answer_query(&self, hub: &Hub, frame: &Frame) {
        let Ok(query) = Query::parse(frame) else {
            return;
        };
        let (code, body) = match self.carry_out(hub, &query).await {
            Ok(body) => (Code::Ok, body),
            Err((code, text)) => (code, refusal(code, &text)),
        };
        let body = body.to_string();
        self.write(|out| {
            let answer = QueryAnswer { code, json: &body };
            if !answer.encode(out, frame.tag) {
                let text = refusal(
                    Code::ResourceExhausted,
                    "the answer is larger than a frame: ask for fewer rows",
                )
                .to_string();
                let answer = QueryAnswer {
                    code: Code::ResourceExhausted,
                    json: &text,
                };
                assert!(answer.encode(out, frame.tag), "a refusal fits a frame");
            }
        });
    }

    async fn carry_out(&self, hub: &Hub, query: &Query<'_>) -> Result<Value, Refusal> {
        let fields: Map<String, Value> = serde_json::from_str(query.json)
            .map_err(|error| invalid(format!("the body must be a JSON object: {error}")))?;
        let fields = Fields(fields);
        let needs = |granted: bool, scope: &str| {
            if granted {
                return Ok(());
            }
            let text =
                format!("the key does not cover `{scope}`: `pelton key create --scope {scope}`");
            Err((Code::PermissionDenied, text))
        };
        match query.operation {
            Operation::Get => {
                fields.only(&["task"])?;
                let target = self.target(hub, fields.text("task")?)?;
                let task = self.get(hub, target).await?;
                Ok(self.describe(hub, &task, true))
            }
            Operation::List => self.list(hub, &fields).await,
            Operation::Stop => {
                needs(self.scopes.manage(), "manage")?;
                fields.only(&["task", "grace_ms"])?;
                let target = self.target(hub, fields.text("task")?)?;
                let grace_ms = fields.number("grace_ms", STOP_GRACE_MS_DEFAULT)?;
                let status = self.stop_one(hub, target, grace_ms).await?;
                Ok(json!({ "status": status.name() }))
            }
            Operation::FunctionList => {
                fields.only(&[])?;
                Ok(hub.edge.with_routes(|routes| {
                    let tenant = routes.tenant(&self.tenant);
                    let functions: Vec<Value> = routes
                        .directory
                        .functions()
                        .iter()
                        .filter(|function| function.live && Some(function.tenant) == tenant)
                        .map(|function| describe_function(&function.name, &function.config))
                        .collect();
                    json!({ "functions": functions })
                }))
            }
            Operation::FunctionGet => {
                fields.only(&["function"])?;
                let name = fields.text("function")?;
                let config = self.function_config(hub, name).ok_or_else(no_function)?;
                Ok(describe_function(name, &config))
            }
            Operation::FunctionSet => {
                needs(self.scopes.manage(), "manage")?;
                let name = fields.text("function")?;
                let before = self.function_config(hub, name).unwrap_or_default();
                let config = fields.function_config(before)?;
                let wish = Wish::SetFunction {
                    tenant: self.tenant.clone(),
                    name: name.to_owned(),
                    config,
                };
                self.wish(hub, wish).await?;
                Ok(describe_function(name, &config))
            }
            Operation::FunctionRemove => {
                needs(self.scopes.manage(), "manage")?;
                fields.only(&["function"])?;
                let name = fields.text("function")?;
                let wish = Wish::RemoveFunction {
                    tenant: self.tenant.clone(),
                    name: name.to_owned(),
                };
                self.wish(hub, wish).await?;
                Ok(json!({ "function": name, "removed": true }))
            }
            Operation::TenantList => {
                needs(self.scopes.admin(), "admin")?;
                fields.only(&[])?;
                Ok(hub.edge.with_routes(|routes| {
                    let tenants: Vec<Value> = routes
                        .directory
                        .tenants()
                        .iter()
                        .map(|tenant| describe_tenant(&tenant.name, &tenant.config))
                        .collect();
                    json!({ "tenants": tenants })
                }))
            }
            Operation::TenantSet => {
                needs(self.scopes.admin(), "admin")?;
                fields.only(&["tenant", "weight", "waiting_max"])?;
                let name = fields.text("tenant")?;
                let before = hub.edge.with_routes(|routes| {
                    let id = routes.tenant(name)?;
                    Some(routes.directory.tenant(id)?.config)
                });
                let before = before.unwrap_or_default();
                let config = TenantConfig {
                    weight: fields.number("weight", before.weight)?,
                    waiting_max: fields.number("waiting_max", before.waiting_max)?,
                };
                let wish = Wish::SetTenant {
                    name: name.to_owned(),
                    config,
                };
                self.wish(hub, wish).await?;
                Ok(describe_tenant(name, &config))
            }
            Operation::Stats => {
                fields.only(&[])?;
                self.stats(hub).await
            }
            Operation::KeyList => {
                needs(self.scopes.admin(), "admin")?;
                fields.only(&[])?;
                let keys = hub.keys.list();
                Ok(json!({ "keys": keys.iter().map(|key| key.to_json()).collect::<Vec<_>>() }))
            }
            Operation::KeyCreate => {
                needs(self.scopes.admin(), "admin")?;
                fields.only(&["tenants", "scopes", "name"])?;
                let tenants = match fields.0.get("tenants") {
                    None | Some(Value::Null) => TenantSet::All,
                    Some(names) => TenantSet::parse(&texts(names, "tenants")?).map_err(invalid)?,
                };
                let scopes = match fields.0.get("scopes") {
                    None | Some(Value::Null) => Scopes::parse(&[]).map_err(invalid)?,
                    Some(names) => Scopes::parse(&texts(names, "scopes")?).map_err(invalid)?,
                };
                let name = fields.0.get("name").and_then(Value::as_str);
                let key = hub
                    .keys
                    .create(tenants, scopes, name.map(str::to_owned))
                    .map_err(|error| {
                        let code = if error.invalid {
                            Code::InvalidArgument
                        } else {
                            Code::Unavailable
                        };
                        (code, error.to_string())
                    })?;
                Ok(json!({ "key": key.id, "secret": key.secret }))
            }
            Operation::KeyRevoke => {
                needs(self.scopes.admin(), "admin")?;
                fields.only(&["key"])?;
                let id = fields.text("key")?;
                let revoked = hub
                    .keys
                    .revoke(id)
                    .map_err(|error| (Code::Unavailable, error.to_string()))?;
                if !revoked {
                    let text = "there is no such key; `pelton key ls` lists them";
                    return Err((Code::NotFound, text.to_owned()));
                }
                Ok(json!({ "key": id, "revoked": true }))
            }
            Operation::BackupStart => {
                needs(self.scopes.admin(), "admin")?;
                fields.only(&["path"])?;
                hub.settings.backups.start(fields.text("path")?).await
            }
            Operation::BackupStatus => {
                needs(self.scopes.admin(), "admin")?;
                fields.only(&["backup"])?;
                hub.settings.backups.status(fields.number("backup", 0)?)
            }
            Operation::BackupCancel => {
                needs(self.scopes.admin(), "admin")?;
                fields.only(&["backup"])?;
                hub.settings.backups.cancel(fields.number("backup", 0)?)
            }
        }
    }

    async fn wish(&self, hub: &Hub, wish: Wish) -> Result<(), Refusal> {
        self.configure(hub, wish)
            .await
            .map_err(|(code, what)| (code, what.to_owned()))
    }

    fn function_config(&self, hub: &Hub, name: &str) -> Option<FunctionConfig> {
        hub.edge.with_routes(|routes| {
            let tenant = routes.tenant(&self.tenant)?;
            Some(routes.function(tenant, name)?.1.config)
        })
    }

    /// The task that a text names.
    fn target(&self, hub: &Hub, text: &str) -> Result<Target, Refusal> {
        match TaskName::parse(text) {
            Some(TaskName::Request(request)) => Ok(Target::Request(request)),
            Some(TaskName::Given {
                function,
                key,
                task_id,
            }) => self.given(hub, &function, key.as_deref(), &task_id),
            None => Err(invalid(
                "a task is named by its request id, FUNCTION/TASK_ID or FUNCTION/KEY/TASK_ID",
            )),
        }
    }

    fn given(
        &self,
        hub: &Hub,
        function: &str,
        key: Option<&str>,
        task_id: &str,
    ) -> Result<Target, Refusal> {
        let id = hub.edge.with_routes(|routes| {
            let tenant = routes.tenant(&self.tenant)?;
            routes.directory.function_id(tenant, function)
        });
        Ok(Target::Given {
            function: id.ok_or_else(no_function)?,
            key: key.unwrap_or("").to_owned(),
            task_id: task_id.to_owned(),
        })
    }

    /// Asks the shard of a task.
    async fn question(
        &self,
        hub: &Hub,
        target: Target,
        question: impl FnOnce(Target) -> TaskQuery,
    ) -> Result<Answered, Refusal> {
        let place = hub.edge.with_routes(|routes| {
            let tenant = routes.tenant(&self.tenant)?;
            let cell = match &target {
                Target::Request(request) => request.cell(),
                Target::Given {
                    function,
                    key,
                    task_id,
                } => routes.cell_of(routes.directory.function(*function)?, key, task_id),
            };
            (cell.0 < CELL_COUNT).then(|| (tenant, routes.shard_of(cell)))
        });
        let Some((tenant, shard)) = place else {
            return Err((Code::NotFound, NO_TASK.to_owned()));
        };
        hub.query(self.id, tenant, shard, question(target))
            .await
            .ok_or_else(|| (Code::Unavailable, SHARD_GONE.to_owned()))
    }

    async fn get(&self, hub: &Hub, target: Target) -> Result<Box<TaskInfo>, Refusal> {
        let question = |target| TaskQuery::Get { target };
        match self.question(hub, target.clone(), question).await? {
            Answered::Info(InfoReply::Task(task)) => Ok(task),
            Answered::Info(InfoReply::NotHeld { request }) => {
                self.get_from_history(hub, target, request).await
            }
            Answered::Reply(Reply::Refused { code, what }) => Err((code, what.to_owned())),
            Answered::Reply(_) | Answered::Info(_) | Answered::Finished { .. } => Err((
                Code::Internal,
                "a get was answered with something else".to_owned(),
            )),
        }
    }

    /// A task that its shard does not hold any more. `request` is its identity, as far as the shard knows that.
    async fn get_from_history(
        &self,
        hub: &Hub,
        target: Target,
        request: Option<RequestId>,
    ) -> Result<Box<TaskInfo>, Refusal> {
        let none = || (Code::NotFound, NO_TASK.to_owned());
        let tenant = hub.edge.with_routes(|routes| routes.tenant(&self.tenant));
        let tenant = tenant.ok_or_else(none)?;
        let history = Arc::clone(hub.edge.history().ok_or_else(none)?);
        let found = read_history(move || history.get(tenant, &target, request));
        found.await?.map(Box::new).ok_or_else(none)
    }

    /// A page of tasks, the last one accepted first. The cursor is the order of the last one looked at, so that it is
    /// stable whatever happens between two pages.
    async fn list(&self, hub: &Hub, fields: &Fields) -> Result<Value, Refusal> {
        fields.only(&[
            "status", "function", "prefix", "tag", "since_ms", "until_ms", "cursor", "limit",
        ])?;
        let text = |name| Ok::<_, Refusal>(fields.optional(name)?.unwrap_or("").to_owned());
        let (prefix, tag) = (text("prefix")?, text("tag")?);
        let state = match fields.optional("status")? {
            None => None,
            Some(name) => Some(State::from_name(name).ok_or_else(|| {
                let names = State::ALL.map(State::name).join(", ");
                invalid(format!("status is one of {names}"))
            })?),
        };
        let tenant = hub.edge.with_routes(|routes| routes.tenant(&self.tenant));
        let Some(tenant) = tenant else {
            return Ok(json!({ "tasks": [], "cursor": null }));
        };
        let function = match fields.optional("function")? {
            None => None,
            Some(name) => Some(self.function_id(hub, tenant, name)?),
        };
        let limit: u32 = fields.number("limit", PAGE_ROWS)?;
        if limit == 0 || limit > PAGE_ROWS_MAX {
            return Err(invalid("limit is from 1 to 1000"));
        }
        let cursor = match fields.optional("cursor")? {
            None => None,
            Some(text) => Some(
                u128::from_str_radix(text, 16)
                    .ok()
                    .filter(|_| text.len() == CURSOR_DIGITS)
                    .ok_or_else(|| invalid("cursor is what the page before answered"))?,
            ),
        };
        let mut filter = ListFilter {
            state,
            function,
            prefix,
            tag,
            since_ms: fields.number("since_ms", 0)?,
            until_ms: fields.number("until_ms", RequestId::ACCEPTED_MS_MAX)?,
            cursor,
            limit,
        };
        let mut tasks = Vec::new();
        let served = hub.edge.served();
        for _ in 0..LISTINGS_MAX {
            let part = self.list_part(hub, tenant, filter.clone(), &served);
            let (page, next) = part.await?;
            tasks.extend(page.iter().map(|task| self.describe(hub, task, false)));
            filter.cursor = next;
            filter.limit = limit - tasks.len() as u32;
            if next.is_none() || filter.limit == 0 {
                break;
            }
        }
        let next = filter
            .cursor
            .map(|cursor| format!("{cursor:0width$x}", width = CURSOR_DIGITS));
        let mut page = json!({ "tasks": tasks, "cursor": next });
        let unserved = served.iter().enumerate().filter(|(_, served)| !**served);
        let unserved: Vec<usize> = unserved.map(|(shard, _)| shard).collect();
        if !unserved.is_empty() {
            page["unserved_shards"] = unserved.into();
        }
        Ok(page)
    }

    /// One part of a page; with a prefix or a tag it may be short, and there are others all the same.
    async fn list_part(
        &self,
        hub: &Hub,
        tenant: TenantId,
        filter: ListFilter,
        served: &[bool],
    ) -> Result<(Vec<TaskInfo>, Option<u128>), Refusal> {
        let mut listing = Listing::new(filter, hub.edge.shard_count());
        while let Some((shard, filter)) = listing.question() {
            if !served[usize::from(shard.0)] {
                // The answer says that what is in its memory is not in it.
                listing.on_page(Vec::new(), 0);
                continue;
            }
            let question = TaskQuery::List { filter };
            match hub.query(self.id, tenant, shard, question).await {
                Some(Answered::Info(InfoReply::Page { tasks, pages })) => {
                    listing.on_page(tasks, pages);
                }
                Some(Answered::Reply(Reply::Refused { code, what })) => {
                    return Err((code, what.to_owned()));
                }
                Some(_) | None => return Err((Code::Unavailable, SHARD_GONE.to_owned())),
            }
        }
        let history = hub.edge.history().cloned();
        read_history(move || listing.finish(tenant, history.as_deref())).await
    }

    fn function_id(&self, hub: &Hub, tenant: TenantId, name: &str) -> Result<FunctionId, Refusal> {
        hub.edge
            .with_routes(|routes| routes.directory.function_id(tenant, name))
            .ok_or_else(no_function)
    }

    fn describe(&self, hub: &Hub, task: &TaskInfo, whole: bool) -> Value {
        let view = &task.view;
        let function = hub.edge.with_routes(|routes| {
            let function = routes.directory.function(view.function);
            function.map(|function| function.name.clone())
        });
        let request_id = view.request.to_string();
        let mut described = json!({
            "request_id": request_id,
            "task_id": if task.task_id.is_empty() { &request_id } else { &task.task_id },
            "tenant": self.tenant,
            "function": function,
            "status": view.state.name(),
            "attempts": view.token.attempt,
            "already_retried_times": view.retries,
            "accepted_ms": view.request.accepted_ms(),
        });
        let mut put = |name: &str, value: Value| described[name] = value;
        if view.due_ms > 0 {
            put("due_ms", view.due_ms.into());
        }
        if task.ended_ms > 0 {
            put("ended_ms", task.ended_ms.into());
        }
        if !task.key.is_empty() {
            put("key", task.key.clone().into());
        }
        if !task.tags.is_empty() {
            put("tags", task.tags.clone().into());
        }
        if view.executor != 0 {
            put("instance_id", format!("{:016x}", view.executor).into());
        }
        if task.code != Code::Ok {
            put("error_code", task.code.name().into());
            put("task_error_message", task.error.clone().into());
        }
        if task.damaged {
            put("damaged", true.into());
        }
        if whole {
            if !task.content_type.is_empty() {
                put("content_type", task.content_type.clone().into());
            }
            if !task.traceparent.is_empty() {
                put("traceparent", task.traceparent.clone().into());
            }
            put_bytes(&mut described, "task_payload", &task.payload);
            if view.state == State::Succeeded {
                put_bytes(&mut described, "return_payload", &task.result);
            }
            if !task.output.is_empty() {
                let output = String::from_utf8_lossy(&task.output).into_owned();
                described["output"] = output.into();
            }
        }
        described
    }

    async fn stats(&self, hub: &Hub) -> Result<Value, Refusal> {
        let mut shards = Vec::new();
        for shard in hub.edge.shards() {
            let tenant = TenantId::default();
            let answered = hub.query(self.id, tenant, shard, TaskQuery::Stats).await;
            match answered {
                Some(Answered::Info(InfoReply::Stats(stats))) => shards.push(stats),
                Some(_) | None => {
                    tracing::warn!(shard = shard.0, "a shard does not answer");
                }
            }
        }
        let totals = sum(shards.iter().map(|stats| stats.counters));
        let described: Vec<Value> = shards.iter().map(|stats| describe_shard(stats)).collect();
        let sessions = hub.sessions.borrow();
        let executors = sessions
            .values()
            .filter(|session| session.executor.is_some());
        Ok(json!({
            "totals": describe_counters(&totals),
            "shards": described,
            "history": hub.edge.history().map(|history| describe_history(&history.stats())),
            "edge": {
                "index": hub.edge.id().0,
                "sessions": sessions.len(),
                "executors": executors.count(),
            },
        }))
    }
}

/// Reads the disk on a thread of its own, while the edge goes on.
async fn read_history<R: Send + 'static, E: std::fmt::Display + Send + 'static>(
    read: impl FnOnce() -> Result<R, E> + Send + 'static,
) -> Result<R, Refusal> {
    let cause = match tokio::task::spawn_blocking(read).await {
        Ok(Ok(read)) => return Ok(read),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::error!(cause, "the history cannot be read");
    Err((
        Code::Unavailable,
        "the history cannot be read: see the server's log".to_owned(),
    ))
}

fn refusal(code: Code, text: &str) -> Value {
    json!({ "code": code.name(), "error": text, "retryable": code.retryable() })
}

fn invalid(text: impl Into<String>) -> Refusal {
    (Code::InvalidArgument, text.into())
}

fn no_function() -> Refusal {
    let text = "there is no such function; `pelton function ls` lists them";
    (Code::NotFound, text.to_owned())
}

fn status_of(state: State) -> Option<TaskStatus> {
    TaskStatus::from_number(state as u8)
}

/// Text as text, anything else as base64 with a field that says so.
fn put_bytes(described: &mut Value, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => described[name] = text.into(),
        Err(_) => {
            described[name] = BASE64.encode(bytes).into();
            described[format!("{name}_encoding")] = "base64".into();
        }
    }
}

fn describe_function(name: &str, config: &FunctionConfig) -> Value {
    json!({
        "function": name,
        "concurrency": config.concurrency,
        "retries": config.retries,
        "backoff_ms_min": config.backoff_ms_min,
        "backoff_ms_max": config.backoff_ms_max,
        "max_age_s": config.max_age_s,
        "timeout_ms": config.timeout_ms,
        "on_failure": match config.on_failure {
            OnFailure::Continue => "continue",
            OnFailure::Hold => "hold",
        },
        "paused": config.paused,
    })
}

fn describe_tenant(name: &str, config: &TenantConfig) -> Value {
    json!({ "tenant": name, "weight": config.weight, "waiting_max": config.waiting_max })
}

fn describe_counters(counters: &pelton_core::event::Counters) -> Value {
    json!({
        "accepted": counters.accepted,
        "duplicates": counters.duplicates,
        "refused": counters.refused,
        "leased": counters.leased,
        "succeeded": counters.succeeded,
        "failed": counters.failed,
        "stopped": counters.stopped,
        "expired": counters.expired,
        "invalid": counters.invalid,
        "retried": counters.retried,
        "throttled": counters.throttled,
        "stale": counters.stale,
        "recovered": counters.recovered,
        "taken_over": counters.taken_over,
        "tasks": counters.tasks,
        "waiting": counters.waiting,
        "running": counters.running,
        "finished": counters.finished,
        "unsaved": counters.unsaved,
        "unsaved_bytes": counters.unsaved_bytes,
        "names": counters.names,
        "fetched_bytes": counters.fetched_bytes,
        "table_bytes": counters.table_bytes,
        "live_bytes": counters.live_bytes,
        "relocated": counters.relocated,
        "relocated_bytes": counters.relocated_bytes,
    })
}

fn describe_history(stats: &HistoryStats) -> Value {
    json!({
        "rows": stats.store.rows,
        "bytes": stats.store.bytes,
        "oldest_ms": stats.store.oldest_ms,
        "lag_bytes": stats.lag_bytes,
        "written": stats.written,
        "writes": stats.writes,
        "read_us": stats.read_us,
        "write_us": stats.write_us,
        "damaged": stats.damaged,
        "failed": stats.failed,
    })
}

fn describe_shard(stats: &ShardStats) -> Value {
    let mut described = describe_counters(&stats.counters);
    let mut histograms = Map::new();
    for stage in Stage::ALL {
        let histogram = stats.histogram(stage);
        histograms.insert(
            stage.name().to_owned(),
            json!({
                "count": histogram.len(),
                "mean": (histogram.mean() * 10.0).round() / 10.0,
                "p50": histogram.value_at_quantile(0.5),
                "p99": histogram.value_at_quantile(0.99),
                "p999": histogram.value_at_quantile(0.999),
                "max": histogram.max(),
            }),
        );
    }
    described["shard"] = stats.shard.0.into();
    described["histograms"] = Value::Object(histograms);
    described["log"] = json!({
        "batches": stats.log.batches,
        "bytes": stats.log.bytes,
        "live_segments": stats.log.live_segments,
        "prepared_segments": stats.log.prepared_segments,
        "recycled": stats.log.recycled,
        "prepare_failures": stats.log.prepare_failures,
        "read_failures": stats.log.read_failures,
        "snapshots": stats.log.snapshots,
        "snapshot_failures": stats.log.snapshot_failures,
        "snapshot_bytes": stats.log.snapshot_bytes,
        "replay_bytes": stats.log.replay_bytes,
        "replay_records": stats.log.replay_records,
        "held": stats.log.held,
        "buffers_registered": stats.registered,
        "poisoned": stats.poisoned,
    });
    described["recovery"] = json!({
        "batches": stats.recovery.batches,
        "records": stats.recovery.records,
        "bytes": stats.recovery.bytes,
        "snapshot_bytes": stats.recovery.snapshot_bytes,
        "snapshots_passed_over": stats.recovery.snapshots_passed_over,
        "took_us": stats.recovery.took_us,
    });
    described["turns"] = stats.turns.into();
    described["parks"] = stats.parks.into();
    described["disk_full"] = stats.disk_full.into();
    described["quarantined"] = stats.quarantined.as_ref().map(describe_quarantine).into();
    described["clock_held"] = stats.clock_held.into();
    described
}

/// Where a shard's log is damaged; the same in `server.json` and in the answer to the statistics.
pub(crate) fn describe_quarantine(quarantine: &Quarantine) -> Value {
    let place = quarantine.error.place();
    json!({
        "error": quarantine.error.to_string(),
        "file": quarantine.error.file(),
        "segment": place.map(|(_, segment, _)| segment),
        "offset": place.map(|(_, _, offset)| offset),
    })
}

fn texts<'v>(value: &'v Value, field: &str) -> Result<Vec<&'v str>, Refusal> {
    let texts = value
        .as_array()
        .and_then(|values| values.iter().map(Value::as_str).collect());
    texts.ok_or_else(|| invalid(format!("`{field}` is a list of texts")))
}

/// The fields of a query's body.
struct Fields(Map<String, Value>);

impl Fields {
    fn only(&self, known: &[&str]) -> Result<(), Refusal> {
        match self.0.keys().find(|name| !known.contains(&name.as_str())) {
            Some(unknown) => Err(invalid(format!(
                "there is no field `{unknown}` here; known are: {}",
                known.join(", ")
            ))),
            None => Ok(()),
        }
    }

    fn optional(&self, name: &str) -> Result<Option<&str>, Refusal> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(format!("`{name}` is a text"))),
        }
    }

    fn text(&self, name: &str) -> Result<&str, Refusal> {
        self.optional(name)?
            .ok_or_else(|| invalid(format!("the field `{name}` is missing")))
    }

    fn number<N: TryFrom<u64>>(&self, name: &str, default: N) -> Result<N, Refusal> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|number| N::try_from(number).ok())
                .ok_or_else(|| invalid(format!("`{name}` is a number that is not in range"))),
        }
    }

    fn function_config(&self, before: FunctionConfig) -> Result<FunctionConfig, Refusal> {
        self.only(&[
            "function",
            "concurrency",
            "retries",
            "backoff_ms_min",
            "backoff_ms_max",
            "max_age_s",
            "timeout_ms",
            "on_failure",
            "paused",
        ])?;
        let on_failure = match self.optional("on_failure")? {
            None => before.on_failure,
            Some("continue") => OnFailure::Continue,
            Some("hold") => OnFailure::Hold,
            Some(_) => return Err(invalid("`on_failure` is `continue` or `hold`")),
        };
        let paused = match self.0.get("paused") {
            None | Some(Value::Null) => before.paused,
            Some(Value::Bool(paused)) => *paused,
            Some(_) => return Err(invalid("`paused` is true or false")),
        };
        Ok(FunctionConfig {
            concurrency: self.number("concurrency", before.concurrency)?,
            retries: self.number("retries", before.retries)?,
            backoff_ms_min: self.number("backoff_ms_min", before.backoff_ms_min)?,
            backoff_ms_max: self.number("backoff_ms_max", before.backoff_ms_max)?,
            max_age_s: self.number("max_age_s", before.max_age_s)?,
            timeout_ms: self.number("timeout_ms", before.timeout_ms)?,
            on_failure,
            paused,
        })
    }
}
