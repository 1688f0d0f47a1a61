{{- /* The first part of every object's name: at most 40 characters that a Service may have too. A longer release name
is cut and told apart by its hash. */ -}}
{{- define "feyntune.fullname" -}}
{{- $name := replace "." "-" .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- if not (regexMatch "^[a-z]" $name) }}{{ $name = printf "r%s" $name }}{{ end -}}
{{- if gt (len $name) 40 }}{{ $name = printf "%s-%s" ($name | trunc 31 | trimSuffix "-") ($name | sha256sum | trunc 8) }}{{ end -}}
{{- $name -}}
{{- end -}}

{{- /* Labels that never change, for selectors. Call with (dict "root" $ "component" "store"). */ -}}
{{- define "feyntune.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "feyntune.labels" -}}
{{ include "feyntune.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: feyntune
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- /* "yes" when the cluster has an API, or it is assumed. Call with (list $ "group/version"). */ -}}
{{- define "feyntune.has" -}}
{{- $root := index . 0 -}}{{- $api := index . 1 -}}
{{- if or ($root.Capabilities.APIVersions.Has $api) (has $api $root.Values.assumeAPIs) -}}yes{{- end -}}
{{- end -}}

{{- /* Folder of the three images. Call with the root. */ -}}
{{- define "feyntune.imagePrefix" -}}
{{- $prefix := trimSuffix "/" .Values.images.prefix -}}
{{- with .Values.global.imageRegistry -}}
{{- printf "%s/%s" (trimSuffix "/" .) $prefix -}}
{{- else -}}{{ $prefix }}{{- end -}}
{{- end -}}

{{- define "feyntune.image" -}}
{{- printf "%s/%s:%s" (include "feyntune.imagePrefix" .root) .name (.root.Values.images.tag | default .root.Chart.AppVersion) -}}
{{- end -}}

{{- /* An image of somebody else, from global.imageRegistry where that is set. Call with (list $ image). */ -}}
{{- define "feyntune.foreignImage" -}}
{{- $image := index . 1 -}}
{{- with (index . 0).Values.global.imageRegistry -}}
{{- printf "%s/%s" (trimSuffix "/" .) (regexReplaceAll "^[^/]*[.:][^/]*/" $image "") -}}
{{- else -}}{{ $image }}{{- end -}}
{{- end -}}

{{- define "feyntune.pullSecretNames" -}}
{{- $names := .Values.images.pullSecrets -}}
{{- range .Values.global.imagePullSecrets }}{{ if kindIs "map" . }}{{ $names = append $names .name }}{{ else }}{{ $names = append $names . }}{{ end }}{{ end -}}
{{- uniq $names | toJson -}}
{{- end -}}

{{- define "feyntune.pullSecrets" -}}
{{- with include "feyntune.pullSecretNames" . | fromJsonArray }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* "yes" where pods say the user and group they run as; OpenShift chooses them from the namespace's own range. */ -}}
{{- define "feyntune.fixedIds" -}}
{{- $ids := .Values.podSecurity.fixedIds | toString -}}
{{- if eq $ids "auto" }}{{ if not (include "feyntune.has" (list . "security.openshift.io/v1")) }}yes{{ end }}
{{- else if eq $ids "true" }}yes{{ end -}}
{{- end -}}

{{- /* What Pod Security "restricted" asks of a pod and of a container, and a little more. */ -}}
{{- define "feyntune.podSecurityContext" -}}
runAsNonRoot: true
{{- if include "feyntune.fixedIds" . }}
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "feyntune.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ not .writableRoot }}
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "feyntune.runsNamespace" -}}
{{- if eq .Values.kubeflow.mode "profile" -}}{{ .Release.Namespace }}{{- else -}}{{ .Values.kubeflow.namespace }}{{- end -}}
{{- end -}}

{{- define "feyntune.kubeflowHost" -}}
{{- .Values.kubeflow.host | default (printf "http://ml-pipeline.%s.svc:8888" .Values.kubeflow.namespace) -}}
{{- end -}}

{{- define "feyntune.registry" -}}
{{- .Values.serving.registry | default (printf "s3://%s/registry" .Values.objectStore.bucket) -}}
{{- end -}}

{{- /* Existing Secrets have the documented names. Secrets that the chart creates have the release's name, so that two
releases can share a namespace for runs. */ -}}
{{- define "feyntune.s3Secret" -}}
{{- if .Values.objectStore.credentials.existing }}feyntune-s3{{ else }}{{ include "feyntune.fullname" . }}-s3{{ end -}}
{{- end -}}

{{- define "feyntune.hubSecret" -}}
{{- if .Values.hub.existing }}feyntune-hub{{ else }}{{ include "feyntune.fullname" . }}-hub{{ end -}}
{{- end -}}

{{- /* The endpoint only reads: the bundled SeaweedFS gives it keys that can do no more. */ -}}
{{- define "feyntune.readSecret" -}}
{{- if and (eq .Values.objectStore.kind "seaweedfs") (not .Values.objectStore.credentials.existing) -}}
{{ include "feyntune.s3Secret" . }}-read
{{- else -}}{{ include "feyntune.s3Secret" . }}{{- end -}}
{{- end -}}

{{- define "feyntune.caConfigMap" -}}
{{- if .Values.caBundle.pem }}{{ include "feyntune.fullname" . }}-ca{{ else }}{{ .Values.caBundle.configMap }}{{ end -}}
{{- end -}}

{{- /* Variables of every pod: extraEnv, and where the CA bundle is. Call with the root; gives a JSON object. */ -}}
{{- define "feyntune.commonEnv" -}}
{{- $env := dict -}}
{{- if include "feyntune.caConfigMap" . -}}
{{- range tuple "SSL_CERT_FILE" "AWS_CA_BUNDLE" "REQUESTS_CA_BUNDLE" }}{{ $_ := set $env . "/etc/feyntune-ca/ca.crt" }}{{ end -}}
{{- end -}}
{{- merge (deepCopy .Values.extraEnv) $env | toJson -}}
{{- end -}}

{{- define "feyntune.envList" -}}
{{- range $name, $value := include "feyntune.commonEnv" . | fromJson }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{- define "feyntune.caMount" -}}
{{- if include "feyntune.caConfigMap" . }}
- {name: ca, mountPath: /etc/feyntune-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "feyntune.caVolume" -}}
{{- with include "feyntune.caConfigMap" . }}
- {name: ca, configMap: {name: {{ . }}}}
{{- end }}
{{- end -}}

{{- /* Nodes of the pods without GPUs. */ -}}
{{- define "feyntune.cpuNodes" -}}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "feyntune.storePort" -}}{{- if eq .Values.objectStore.kind "minio" -}}9000{{- else -}}8333{{- end -}}{{- end -}}

{{- define "feyntune.endpoint" -}}
{{- if eq .Values.objectStore.kind "external" -}}{{ .Values.objectStore.endpoint }}
{{- else -}}http://{{ include "feyntune.fullname" . }}-store.{{ .Release.Namespace }}.svc:{{ include "feyntune.storePort" . }}{{- end -}}
{{- end -}}

{{- /* The keys of the object store, drawn once: later installs find them in the Secret. */ -}}
{{- define "feyntune.credentials" -}}
{{- if not (hasKey .Values.objectStore "drawn") -}}
  {{- $given := .Values.objectStore.credentials -}}
  {{- $there := lookup "v1" "Secret" .Release.Namespace (include "feyntune.s3Secret" .) -}}
  {{- $access := $given.accessKey -}}{{- $secret := $given.secretKey -}}
  {{- if and (not $access) $there -}}{{- $access = index $there.data "AWS_ACCESS_KEY_ID" | b64dec -}}{{- end -}}
  {{- if and (not $secret) $there -}}{{- $secret = index $there.data "AWS_SECRET_ACCESS_KEY" | b64dec -}}{{- end -}}
  {{- $drawn := dict "access" ($access | default (randAlphaNum 20)) "secret" ($secret | default (randAlphaNum 40)) -}}
  {{- $reader := lookup "v1" "Secret" .Release.Namespace (printf "%s-read" (include "feyntune.s3Secret" .)) -}}
  {{- if $reader -}}
    {{- $_ := set $drawn "readAccess" (index $reader.data "AWS_ACCESS_KEY_ID" | b64dec) -}}
    {{- $_ := set $drawn "readSecret" (index $reader.data "AWS_SECRET_ACCESS_KEY" | b64dec) -}}
  {{- else -}}
    {{- $_ := set $drawn "readAccess" (randAlphaNum 20) -}}{{- $_ := set $drawn "readSecret" (randAlphaNum 40) -}}
  {{- end -}}
  {{- $_ := set .Values.objectStore "drawn" $drawn -}}
{{- end -}}
{{- end -}}

{{- /* The store's address and keys. Call with a Secret's name. */ -}}
{{- define "feyntune.s3Env" -}}
{{- $secret := . }}
{{- range tuple "S3_ENDPOINT" "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" "AWS_DEFAULT_REGION" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: {{ . }}}}
{{- end }}
{{- end -}}

{{- /* A container of the worker image. Call with (dict "root" $ "name" "…"); args, env and mounts follow it. */ -}}
{{- define "feyntune.worker" -}}
- name: {{ .name }}
  image: {{ include "feyntune.image" (dict "root" .root "name" "worker") }}
  imagePullPolicy: {{ .root.Values.images.pullPolicy }}
  securityContext: {{- include "feyntune.securityContext" . | nindent 4 }}
  resources:
    requests: {cpu: 100m, memory: 256Mi}
    limits: {memory: 1Gi}
{{- end -}}

{{- define "feyntune.monitored" -}}
{{- $there := include "feyntune.has" (list . "monitoring.coreos.com/v1") -}}
{{- if or (eq .Values.monitoring.enabled "always") (and (eq .Values.monitoring.enabled "auto") $there) -}}yes{{- end -}}
{{- end -}}
