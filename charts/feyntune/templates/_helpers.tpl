{{- define "feyntune.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{- end -}}
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

{{- define "feyntune.image" -}}
{{- printf "%s/%s:%s" (trimSuffix "/" .root.Values.images.prefix) .name (.root.Values.images.tag | default .root.Chart.AppVersion) -}}
{{- end -}}

{{- define "feyntune.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* What Pod Security "restricted" asks of a pod and of a container, and a little more. */ -}}
{{- define "feyntune.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
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

{{- define "feyntune.storePort" -}}{{- if eq .Values.objectStore.kind "minio" -}}9000{{- else -}}8333{{- end -}}{{- end -}}

{{- define "feyntune.endpoint" -}}
{{- if eq .Values.objectStore.kind "external" -}}{{ .Values.objectStore.endpoint }}
{{- else -}}http://{{ include "feyntune.fullname" . }}-store.{{ .Release.Namespace }}.svc:{{ include "feyntune.storePort" . }}{{- end -}}
{{- end -}}

{{- /* The keys of the object store, drawn once: later installs find them in the Secret. */ -}}
{{- define "feyntune.credentials" -}}
{{- if not (hasKey .Values.objectStore "drawn") -}}
  {{- $given := .Values.objectStore.credentials -}}
  {{- $there := lookup "v1" "Secret" .Release.Namespace "feyntune-s3" -}}
  {{- $access := $given.accessKey -}}{{- $secret := $given.secretKey -}}
  {{- if and (not $access) $there -}}{{- $access = index $there.data "AWS_ACCESS_KEY_ID" | b64dec -}}{{- end -}}
  {{- if and (not $secret) $there -}}{{- $secret = index $there.data "AWS_SECRET_ACCESS_KEY" | b64dec -}}{{- end -}}
  {{- $drawn := dict "access" ($access | default (randAlphaNum 20)) "secret" ($secret | default (randAlphaNum 40)) -}}
  {{- $_ := set .Values.objectStore "drawn" $drawn -}}
{{- end -}}
{{- end -}}

{{- define "feyntune.s3Env" -}}
{{- range tuple "S3_ENDPOINT" "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" "AWS_DEFAULT_REGION" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: feyntune-s3, key: {{ . }}}}
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
